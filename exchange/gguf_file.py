"""GGUF: weights, shape, vocabulary and chat template in one file, for llama.cpp, ollama and LM Studio.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. GGUF's "llama" keeps Meta's order of rows in wq and wk, as
we do. Vectors stay fp32; a matrix whose rows a quantised type cannot divide into blocks stays f16, and the embedding
and output matrices, which suffer most, have at least 8 bits (llama.cpp's own quantiser spares them too).
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, LlamaFileType, RopeScalingType, quants
from torch import Tensor

from chatglm_tokenizer.base import Tokenizer
from exchange.gguf_vocabulary import write_vocabulary
from exchange.hf_weights import renamed
from model import ModelArgs, Transformer
from rope import rope_frequencies
from stage import UserError
from training.state import weights_of

OUTSIDE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
INSIDE = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
FILE_TYPES = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
FLOATS = ("f32", "f16", "bf16")
BLOCK = 32  # weights that share a scale, in all of the quantised types above
ROPE_FREQS = "rope_freqs.weight"


def write_gguf(
    path: Path, model: Transformer, tokenizer: Tokenizer, template: str | None, name: str, dtype: str
) -> Counter:
    """Write a model with its vocabulary; returns how many tensors have which type.

    tokenizer: ours, of either kind. template: the chat format in Jinja. dtype: a key of FILE_TYPES.
    UserError for what GGUF or the vocabulary's kind cannot express.
    """
    kind, file_type = FILE_TYPES[dtype]
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(file_type)
    if dtype not in FLOATS:
        writer.add_quantization_version(2)
    write_shape(writer, model.args)
    write_vocabulary(writer, tokenizer, model.args.vocab_size)
    if template:
        writer.add_chat_template(template)
    tensors = tensors_of(model)
    types = {key: type_of(key, tensor, kind) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        shape, bytes_type = quants.quant_shape_to_byte_shape(tensor.shape, types[key]), np.dtype(np.uint8)
        size = int(np.prod(shape))
        writer.add_tensor_info(key, shape, bytes_type, size, raw_dtype=types[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (
        key,
        tensor,
    ) in tensors.items():  # one after the other: quantised copies of all would double the memory
        writer.write_tensor_data(quants.quantize(as_array(tensor), types[key]))
    writer.close()
    return Counter(kind.name for kind in types.values())


def write_shape(writer: GGUFWriter, args: ModelArgs) -> None:
    """The sizes, and how positions are rotated."""
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_vocab_size(args.vocab_size)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    scaling = args.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        if not scaling.get("truncate", True) or {"mscale", "attention_factor"} & set(scaling):
            raise UserError(
                "GGUF 不能表示这个 YaRN 的 mscale、attention_factor 或 truncate=false；请用 --format hf。"
            )
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1.0))
    # "dynamic" changes nothing up to the context length, which is as far as the file allows; "llama3" is a tensor.


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """The tensors of the file under GGUF's names; a tied matrix once."""
    weights = {gguf_name(name): value.detach() for name, value in weights_of(model).items()}
    return rope_factors(model.args) | weights


def rope_factors(args: ModelArgs) -> dict[str, Tensor]:
    """What llama.cpp divides each frequency by, (D/2,), where Llama 3.1's scaling is used."""
    if not args.rope_scaling or args.rope_scaling["rope_type"] != "llama3":
        return {}
    plain, _ = rope_frequencies(replace(args, rope_scaling=None))
    return {ROPE_FREQS: plain / rope_frequencies(args)[0]}


def gguf_name(meta_name: str) -> str:
    """GGUF's name of one of our weights."""
    return renamed(meta_name, "layers", OUTSIDE, INSIDE, "blk")


def type_of(key: str, tensor: Tensor, wanted: Type) -> Type:
    """The type in which a tensor is written."""
    if tensor.dim() == 1:
        return Type.F32
    if wanted in (Type.F32, Type.F16, Type.BF16):
        return wanted
    if tensor.shape[-1] % BLOCK:
        return Type.F16
    return Type.Q8_0 if key.startswith(("token_embd", "output")) else wanted


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The metadata of a GGUF file by key, and its weights under our names in fp32, (a tied matrix once)."""
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    layers = fields["llama.block_count"]
    ours = [f"layers.{i}.{name}.weight" for i in range(layers) for name in INSIDE]
    ours = {gguf_name(name): name for name in ours + [f"{name}.weight" for name in OUTSIDE]}
    weights = {
        ours.get(tensor.name, tensor.name): torch.from_numpy(
            np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        for tensor in reader.tensors
    }
    return fields, weights
