"""The words' side of PixArt: a tokenizer of whole words and a small T5 encoder, warmed up on the pictures themselves.

Tokenizer: a unigram model whose pieces are the words of the captions plus single characters at a bad price: a caption's
word is one token, any other word is spelled, nothing of ASCII is unknown. It is stored as a `tokenizers` file that
transformers reads back without the network.

Warm-up: cross attention learns little while all words look alike, and a text encoder learns little while cross
attention ignores it. To break the circle, the encoder is first trained alone to predict, from every token's state by
one linear layer, the whole picture's latents. This takes a minute, puts synonyms at one place, and spares the joint
training its slow start. The linear layer is thrown away.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

MAX_LENGTH = 32
WIDTH = 192


def words_of(texts: Sequence[str]) -> Counter[str]:
    """Tokens as the pre-tokenizer sees them: lower case, split at spaces, punctuation on its own."""
    import re

    return Counter(word for text in texts for word in re.findall(r"[^\W_]+|[^\w\s]", text.lower()))


def build_tokenizer(texts: Sequence[str]) -> Any:
    """A T5 tokenizer whose pieces are the words of ``texts`` (frequent first) and all printable ASCII characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    count = words_of(texts)
    total = sum(count.values())
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    pieces += [("\u2581" + word, math.log(c / total)) for word, c in sorted(count.items(), key=lambda i: (-i[1], i[0]))]
    known = {piece for piece, _ in pieces}
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()] + ["\u2581"]
    pieces += [(c, -20.0) for c in characters if c not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w\s]|_"), "isolated"),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_encoder(vocabulary: int) -> nn.Module:
    """A fresh T5 v1.1 encoder: 3 layers of width 192, 1.2 M parameters."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=6,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """(token ids, mask), both int64 [N, length]."""
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask


class WarmUp(nn.Module):
    """The encoder with the linear layer that the warm-up needs: every token's state -> the picture's latents."""

    def __init__(self, encoder: nn.Module, latents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, latents)

    def loss(self, ids: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over all real tokens. ids, mask [B, L]; target [B, latents]."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [B, L, WIDTH]
        weight = mask.float() / mask.sum(1, keepdim=True)
        # E|h - y|^2 over tokens, without a [B, L, latents] tensor for the target's copies
        predicted = self.head(states).float()  # [B, L, latents]
        return ((predicted - target[:, None]).square().mean(2) * weight).sum(1).mean()
