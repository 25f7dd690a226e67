"""Tiny Hugging Face folders made on the spot: random Llamas, vocabularies trained by `tokenizers`, chat templates."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("README*.md")]
# How Llama 3 cuts a text before merging (https://huggingface.co/meta-llama/Meta-Llama-3-8B, tokenizer.json).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles!') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def byte_level(specials: list[str]) -> Tokenizer:
    """A vocabulary of Llama 3's kind: byte-level BPE, special tokens behind the pieces."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer


def sentencepiece_like(first_only: bool) -> Tokenizer:
    """A vocabulary of Llama 2's kind: spaces as ▁, bytes for what is missing, `<s>` and `</s>` among the pieces.

    first_only: only the beginning of a text gets a space before it (transformers' legacy=False), not what follows
    a special token.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=1200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in model["merges"]]
    # "</s>" is also what merges lead to, as in a vocabulary trained on web pages.
    merges += [("<", "/"), ("</", "s"), ("</s", ">")]
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(p for p in ("</", "</s") if p not in vocab)}
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(names)
    return tokenizer


L3_NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
KINDS = {  # name -> vocabulary, first and last token, template
    "llama3": (lambda: byte_level(L3_NAMES), "<|begin_of_text|>", "<|eot_id|>", LLAMA3),
    "chatml": (lambda: byte_level(["<|im_start|>", "<|im_end|>"]), None, "<|im_end|>", CHATML),
    "llama2": (lambda: sentencepiece_like(False), "<s>", "</s>", LLAMA2),
    "plain": (lambda: sentencepiece_like(True), "<s>", "</s>", PLAIN),
}


def write_tokenizer(folder: Path, kind: str):
    """The tokenizer's files of a kind; returns transformers' own tokenizer."""
    from transformers import PreTrainedTokenizerFast

    make, bos, eos, template = KINDS[kind]
    theirs = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token=bos, eos_token=eos)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return theirs


def write_llama(folder: Path, shard: str = "10GB", safe: bool = True, **shape: object):
    """A random tiny Llama in a folder; returns transformers' model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = dict(
        hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, vocab_size=300, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**small | shape)).eval()
    with torch.no_grad():  # norms that are no ones
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder, max_shard_size=shard)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model
