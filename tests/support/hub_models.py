"""Tiny models of transformers with a tokenizer by the word, saved as folders."""

from __future__ import annotations

from pathlib import Path

from gbp_ray.workloads.images import import_vision

WORDS = [f"w{number}" for number in range(20)]
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def write_models(place: Path, layers: int = 1, heads: int = 2, key_value_heads: int = 1) -> None:
    """Writes the folders "bert" and "llama"."""
    import_vision("models")
    import tokenizers
    import transformers as library

    known = {word: number for number, word in enumerate([*_SPECIAL.values(), *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    sizes = {
        "vocab_size": len(known),
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    bert = library.BertConfig(**sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    llama = library.LlamaConfig(
        **sizes, num_key_value_heads=key_value_heads, tie_word_embeddings=True
    )
    for name, model in (
        ("bert", library.BertForMaskedLM(bert)),
        ("llama", library.LlamaForCausalLM(llama)),
    ):
        model.save_pretrained(place / name)
        given = _SPECIAL if name == "bert" else {}
        library.PreTrainedTokenizerFast(tokenizer_object=made, **given).save_pretrained(
            place / name
        )
