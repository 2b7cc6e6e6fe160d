"""The words' side of the image models: a tokenizer of whole words and a small T5 or CLIP encoder, warmed up on the pictures.

Tokenizer: a unigram model whose pieces are the words of the captions plus single characters at a bad price: a caption's
word is one token, any other word is spelled, nothing of ASCII is unknown. It is stored as a `tokenizers` file that
transformers reads back without the network.

Warm-up: cross attention learns little while all words look alike, and a text encoder learns little while cross
attention ignores it. To break the circle, the encoder is first trained alone to predict, from every token's state by
one linear layer, the whole picture's latents. This takes a minute, puts synonyms at one place, and spares the joint
training its slow start. The linear layer is thrown away. CLIP's attention is causal, so there only the tokens behind the
text are asked: the others have not read all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

MAX_LENGTH = 32
WIDTH = 192


def words_of(texts: Sequence[str]) -> Counter[str]:
    """Return tokens as the pre-tokenizer sees them: lower case, split at spaces, punctuation on its own."""
    import re

    return Counter(word for text in texts for word in re.findall(r"[^\W_]+|[^\w\s]", text.lower()))


@dataclass(frozen=True)
class Special:
    """The tokens of an encoder that are no words. ``first`` lists them in the order of their ids; a text stands between
    ``begin`` and ``end``.
    """

    first: tuple[str, ...]
    pad: str
    end: str
    begin: str | None = None

    @property
    def around(self) -> list[str]:
        """Return what is put around a text, for the tokenizer's post-processor."""
        return [token for token in (self.begin, "$A", self.end) if token]


T5 = Special(("<pad>", "</s>", "<unk>"), pad="<pad>", end="</s>")
CLIP = Special(
    ("<|startoftext|>", "<|endoftext|>", "<unk>"), pad="<|endoftext|>", end="<|endoftext|>", begin="<|startoftext|>"
)


def build_tokenizer(texts: Sequence[str], special: Special = T5) -> Any:
    """Return a tokenizer whose pieces are the words of ``texts`` (frequent first) and all printable ASCII
    characters.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    count = words_of(texts)
    total = sum(count.values())
    pieces: list[tuple[str, float]] = [(token, -100.0 if token == "<unk>" else 0.0) for token in special.first]
    pieces += [("\u2581" + word, math.log(c / total)) for word, c in sorted(count.items(), key=lambda i: (-i[1], i[0]))]
    known = {piece for piece, _ in pieces}
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()] + ["\u2581"]
    pieces += [(c, -20.0) for c in characters if c not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.first.index("<unk>")))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w\s]|_"), "isolated"),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    ids = [(token, special.first.index(token)) for token in special.around if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=special.around, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special.pad,
        eos_token=special.end,
        bos_token=special.begin,
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_clip(vocabulary: int) -> nn.Module:
    """Return a fresh CLIP text encoder: 3 layers of width 192, 1.2 M parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def build_encoder(vocabulary: int) -> nn.Module:
    """Return a fresh T5 v1.1 encoder: 3 layers of width 192, 1.2 M parameters."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_t5(vocabulary)))


def build_umt5(vocabulary: int) -> nn.Module:
    """Return a fresh UMT5 encoder: as T5's, but every layer has position biases of its own."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**_t5(vocabulary)))


def _t5(vocabulary: int) -> dict[str, Any]:
    """Return the configuration of a small T5 encoder."""
    return {
        "vocab_size": vocabulary,
        "d_model": WIDTH,
        "d_kv": 32,
        "d_ff": 384,
        "num_layers": 3,
        "num_heads": 6,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 32,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return (token ids, mask), both int64 [N, length]."""
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask


class WarmUp(nn.Module):
    """The encoder with the linear layer that the warm-up needs: every token's state -> the picture's latents."""

    def __init__(self, encoder: nn.Module, latents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, latents)

    def loss(self, ids: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error over the tokens that are asked. ids, mask ``[B, L]``; target ``[B, latents]``."""
        if self.encoder.config.model_type.startswith("clip"):  # pads are attended to, as in the pipeline
            states = self.encoder(input_ids=ids).last_hidden_state.float()  # [B, L, WIDTH]
            mask = (ids == self.encoder.config.eos_token_id).long()
        else:
            states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight = mask.float() / mask.sum(1, keepdim=True)
        # E|h - y|^2 over tokens, without a [B, L, latents] tensor for the target's copies
        predicted = self.head(states).float()  # [B, L, latents]
        return ((predicted - target[:, None]).square().mean(2) * weight).sum(1).mean()
