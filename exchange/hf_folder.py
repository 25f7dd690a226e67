"""A Hugging Face folder: config.json, safetensors, generation_config.json and the tokenizer's files."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange.hf_config import hf_from_args
from exchange.hf_tokenizer_file import write_tokenizer
from exchange.hf_weights import to_hf
from model import Transformer
from sources.report import write_json

INDEX = "model.safetensors.index.json"


def write_hf(folder: Path, model: Transformer, tokenizer, template: str, dtype: str, shard_gb: float) -> None:
    """Write a folder that `from_pretrained` loads without own code.

    tokenizer: ours, of either kind; one that came from a Hugging Face folder is written back as it was.
    dtype: torch's name of it. shard_gb: weights above this size are cut into several files.
    """
    folder.mkdir()
    ids = token_ids(tokenizer)
    write_json(folder / "config.json", {**hf_from_args(model.args), **ids, "torch_dtype": dtype})
    # vLLM takes its defaults from here too; greedy, as eval.py and serve.py answer.
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    write_weights(folder, model, getattr(torch, dtype), shard_gb)
    if isinstance(tokenizer, ChatGLMTokenizer):
        write_tokenizer(folder, tokenizer, model.args.vocab_size, model.args.max_seq_len, template)
    else:
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)


def token_ids(tokenizer) -> dict[str, Any]:
    """The ids that begin, end and fill up a text."""
    stop = list(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.special_tokens["<bos>"],
        "eos_token_id": stop[0] if len(stop) == 1 else stop,
        "pad_token_id": tokenizer.special_tokens.get("<pad>", stop[0]),
    }


def write_weights(folder: Path, model: Transformer, dtype: torch.dtype, shard_gb: float) -> None:
    """Write the weights under Hugging Face's names, in one file or in several with an index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    weights = {name: value.to(dtype).contiguous() for name, value in to_hf(weights, model.args).items()}
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=int(shard_gb * 1e9))
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
