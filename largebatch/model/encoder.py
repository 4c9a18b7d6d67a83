"""The encoder: a transformers backbone, a pooling and the texts' settings, in one module.

Shapes: n texts, L tokens, H hidden width, d embedding width.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.batch import Chunk, Int64Array, IntArray, Texts
from largebatch.config import PACKINGS
from largebatch.data.text import (
    TextSettings,
    end_token_of,
    lower_texts,
    pad_token_of,
    set_text_end,
    tokenize,
)
from largebatch.errors import UserError
from largebatch.model.attention import (
    known_padding,
    run_packed,
    use_packed_attention,
    why_not_packable,
)
from largebatch.model.chunks import (
    IGNORED,
    TextRows,
    TokenChunk,
    lay_out,
    pack_chunks,
    pad_chunks,
    plan_chunks,
)
from largebatch.model.compiled import checkpoint_layers as checkpoint_layers_of
from largebatch.model.compiled import compile_layers, is_compiled, plain_shape
from largebatch.model.embed import embed_slices
from largebatch.model.export import (
    Parts,
    load_module_weights,
    options_of,
    save_sentence_transformer,
    save_settings,
)
from largebatch.model.finite import check_weights, damaged_weight
from largebatch.model.head import Head, HeadSettings
from largebatch.model.last_layer import pooled_tokens, prepare_last_layer
from largebatch.model.pooling import (
    THEIR_PACKAGE,
    Pooling,
    make_pooling,
    pool_chunk,
    pooling_class,
    zero_where_masked,
)
from largebatch.model.positions import (
    check_fit,
    length_multiple,
    skipped_position,
    usable_positions,
)
from largebatch.model.pretrained import (
    backbone_from_config,
    check_model_folder,
    load_backbone,
    load_tokenizer,
    new_backbone,
    tokenizer_of,
)
from largebatch.model.probe import check_backbone
from largebatch.model.settings import (
    cut_at_tokenizer,
    cut_lengths,
    merged_settings,
    read_settings,
)
from largebatch.transfer import to_device

log = logging.getLogger(__name__)

WORTH_PACKING = 0.1
"""Share of padding above which packing pays on a CPU; measured by benchmarks/packing.py."""


class Encoder(nn.Module):
    """Turns chunks of tokens, or texts, into embeddings.

    Args:
        backbone: Any transformers model whose output has `last_hidden_state`.
        tokenizer: Its tokenizer.
        pooling: cls, mean, last, weighted_mean or latent_attention; or what makes a `Pooling` for a
            width of hidden states, such as its class.
        normalize: Whether embeddings have unit length.
        latents: Of latent_attention: how many latents there are; None: 512.
        heads: Of latent_attention: how many heads; None: 8.
        dense: Widths of linear layers behind the pooling; None: there are none.
        dense_activations: Function after each of them, or one for all: identity, tanh, relu, gelu
            or silu; None: identity.
        dense_bias: Whether they have a bias; None: they have.
        layer_norm: Whether a LayerNorm without trained weights comes last; None: it does not.
        query_prompt: Put before each query, in training and whenever queries are encoded.
        document_prompt: Put before each document.
        query_max_tokens: Longest query in training; encoding cuts at the larger of both numbers.
        document_max_tokens: Longest document in training.
        default_side: query or document: whose prompt an exported folder puts before a text of
            which sentence-transformers is not told the side. None: no prompt.
        lower_case: Whether texts are put in lower case, whatever the tokenizer does by itself.
        append_eos: Whether each text ends in a fixed token: the tokenizer's own, else its
            eos_token. None: as the tokenizer does, with a warning where `last` finds none.
        packing: Whether texts go through the backbone in one row without padding, which gives the
            same embeddings: on (where the backbone allows it), off, or auto (where it is faster).
        compile: Whether torch.compile compiles the layers. Texts are then padded.
        checkpoint_layers: Whether each layer runs again in the backward pass, so that the graph
            holds little more than the layers' inputs.
        bidirectional: Whether the tokens of a decoder see those behind them too; its sliding
            windows then reach to both sides. None: as the backbone's config says.

    Raises:
        UserError: The pooling or packing is unknown, the tokenizer has tokens that the backbone
            lacks, a maximum length is beyond the backbone's positions, the backbone can't be
            trained, compiled, checkpointed or made bidirectional here, or its first token, which
            is to be the embedding, sees no other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        *,
        pooling: str | Callable[[int], Pooling] = "mean",
        normalize: bool = True,
        latents: int | None = None,
        heads: int | None = None,
        dense: Sequence[int] | None = None,
        dense_activations: Sequence[str] | None = None,
        dense_bias: bool | None = None,
        layer_norm: bool | None = None,
        query_prompt: str = "",
        document_prompt: str = "",
        query_max_tokens: int = 128,
        document_max_tokens: int = 256,
        default_side: str | None = None,
        lower_case: bool = False,
        append_eos: bool | None = None,
        packing: str = "auto",
        compile: bool = False,  # noqa: A002
        checkpoint_layers: bool = False,
        bidirectional: bool | None = None,
    ) -> None:
        super().__init__()
        if packing not in PACKINGS:
            raise UserError(f"packing={packing!r} is not one of {', '.join(PACKINGS)}")
        if isinstance(pooling, str):
            pooling_class(pooling)  # Before anything takes time.
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.normalize = normalize
        self.packing = packing
        self._told_why_padded = False
        self.text = TextSettings(
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            query_max_tokens=query_max_tokens,
            document_max_tokens=document_max_tokens,
            default_side=default_side,
            append_eos=append_eos,
        )
        self.lower_case = lower_case
        self.autocast_dtype: torch.dtype | None = None
        """Set to bfloat16 for mixed precision in the backbone."""
        if lower_case:
            lower_texts(tokenizer)
        if append_eos is not None:
            set_text_end(tokenizer, append_eos=append_eos)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = pad_token_of(tokenizer)
        check_fit(backbone, tokenizer, self.text)
        known = set(tokenizer.get_vocab().values())
        probed = check_backbone(
            backbone,
            token_ids=sorted(known - set(tokenizer.all_special_ids) or known),
            pad_id=self.pad_id,
            longest=self.text.encode_max_tokens,
            bidirectional=bidirectional,
        )
        self.pooling = make_pooling(pooling, probed.hidden_width, latents=latents, heads=heads)
        if self.pooling.token == "first" and probed.is_causal:
            raise UserError(
                f"pooling.mode={self.pooling.name}: the first token of {type(backbone).__name__} "
                "sees no other, so that all texts would be alike; use pooling.mode=last or mean, "
                "or backbone.bidirectional=true"
            )
        if self.pooling.token == "last" and append_eos is None and end_token_of(tokenizer) is None:
            log.warning(
                "pooling.mode=%s: the tokenizer ends texts in no fixed token, so that the last "
                "word of a text stands for all of it; text.append_eos=true appends %s, "
                "text.append_eos=false says that it is meant",
                self.pooling.name, tokenizer.eos_token or "an eos_token",
            )  # fmt: skip
        settings = HeadSettings.of_options(dense, dense_activations, dense_bias, layer_norm)
        self.head = Head(self.pooling.width, settings) if settings.is_there else None
        if any(module.package != THEIR_PACKAGE for module in self.pooling.folder_modules()):
            log.warning(
                "pooling.mode=%s: sentence-transformers has nothing like it, so that only "
                "largebatch loads the exported folder (Encoder.from_pretrained)", self.pooling.name,
            )  # fmt: skip
        self.embedding_width = self.pooling.width if self.head is None else self.head.width
        """Width d of an embedding."""
        # Compiled layers share one graph, which would leave out the last layer's hooks.
        self._has_one_token_layer = (
            self.pooling.token is not None and not compile and prepare_last_layer(backbone)
        )
        use_packed_attention(backbone)
        self.extra_forwards = 1.0 if checkpoint_layers else 0.0
        """Forward passes that the backward pass repeats, whatever a chunk keeps."""
        if checkpoint_layers:
            checkpoint_layers_of(backbone)
        if compile:
            compile_layers(backbone)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        latents: int | None = None,
        heads: int | None = None,
        dense: Sequence[int] | None = None,
        dense_activations: Sequence[str] | None = None,
        dense_bias: bool | None = None,
        layer_norm: bool | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        query_max_tokens: int | None = None,
        document_max_tokens: int | None = None,
        append_eos: bool | None = None,
        tokenizer: str | Path | None = None,
        attention: str = "sdpa",
        **how: Any,
    ) -> "Encoder":
        """Load a transformers or sentence-transformers folder, or a hub name.

        What is not given is as the folder's sentence-transformers settings say, else as the
        defaults of the constructor, lengths as far as the model has positions; what is given
        instead is told in a warning. Code of the folder is never run; weights are safetensors.
        `how` is packing, compile, checkpoint_layers and bidirectional, as in the constructor.

        Raises:
            UserError: There is no such model, it has no safetensors, a weight is not finite, or its
                settings say what can't be done here, such as modules that are more than a
                transformer, a pooling and a normalization.
        """
        name = str(path_or_name)
        check_model_folder(name)
        given = {
            "pooling": pooling,
            "normalize": normalize,
            "latents": latents,
            "heads": heads,
            "dense": None if dense is None else list(dense),
            "dense_activations": None if dense_activations is None else list(dense_activations),
            "dense_bias": dense_bias,
            "layer_norm": layer_norm,
            "query_prompt": query_prompt,
            "document_prompt": document_prompt,
            "query_max_tokens": query_max_tokens,
            "document_max_tokens": document_max_tokens,
            "append_eos": append_eos,
        }
        settings = merged_settings(name, **given)
        own_tokenizer = tokenizer_of(name, tokenizer)
        cut_at_tokenizer(settings, given, own_tokenizer, name)
        backbone = load_backbone(name, attention=attention)
        positions = usable_positions(backbone)
        cut_lengths(settings, given, most=positions, reason=f"{name} has no more positions")
        encoder = cls(backbone, own_tokenizer, **how, **settings)
        own = read_settings(name)
        load_module_weights(
            encoder.pooling,
            encoder.head,
            name,
            skip_pooling=any(
                settings.get(key) != own.get(key) for key in ("pooling", "latents", "heads")
            ),
            skip_head=any(settings.get(key) != own.get(key) for key in ("dense", "layer_norm")),
        )
        check_weights(encoder, name)
        return encoder

    @classmethod
    def from_scratch(
        cls,
        model_type: str,
        tokenizer: Any,
        *,
        config: Mapping[str, Any] | None = None,
        attention: str = "sdpa",
        **settings: Any,
    ) -> "Encoder":
        """Build an untrained backbone of a transformers architecture.

        Args:
            model_type: transformers' name of the architecture, such as bert.
            tokenizer: Its length is the size of the vocabulary.
            config: Entries of the architecture's config, such as hidden_size.
            attention: transformers' attention implementation.
            settings: pooling, prompts, lengths, packing and so on, as in the constructor.
        """
        backbone = new_backbone(model_type, tokenizer, config=config or {}, attention=attention)
        return cls(backbone, tokenizer, **settings)

    @classmethod
    def from_settings(cls, folder: Path, *, attention: str = "sdpa", **how: Any) -> "Encoder":
        """Build an untrained encoder by what `save_settings` wrote, for a checkpoint to fill."""
        return cls(
            backbone_from_config(folder, attention=attention),
            load_tokenizer(str(folder)),
            **how,
            **read_settings(str(folder)),
        )

    def forward(self, chunk: Chunk) -> Tensor:
        """Return the embeddings of a chunk, `[n, d]` in float32 (float64 for a float64 model)."""
        if self._has_one_token_layer:
            assert self.pooling.token is not None
            places_n = pooled_tokens(self.pooling.token, chunk)
            # One row of the n texts' tokens.
            hidden_1nH = self._run_backbone(chunk, pooled_tokens=places_n)
            mask_n = chunk.attention_mask.flatten()[places_n]
            embeddings_nd = zero_where_masked(hidden_1nH[0], mask_n)
        else:
            embeddings_nd = pool_chunk(self.pooling, self.hidden_states(chunk), chunk)
        if self.head is not None:
            embeddings_nd = self.head(embeddings_nd)
        return F.normalize(embeddings_nd, dim=-1) if self.normalize else embeddings_nd

    def hidden_states(self, chunk: Chunk) -> Tensor:
        """Return the last hidden states of a chunk's tokens, for objectives of tokens.

        `[n, L, H]`, or `[1, T, H]` where the chunk is packed; float32 (float64 for a float64
        model).
        """
        hidden = self._run_backbone(chunk)
        n, length = chunk.input_ids.shape
        # A compiled backbone has padded more. A slice of all would cost its copy going backward.
        return hidden if hidden.shape[:2] == (n, length) else hidden[:n, :length]

    def _run_backbone(self, chunk: Chunk, **options: Any) -> Tensor:
        """Return the last hidden states; of a compiled backbone with the padding of its shape."""
        device = chunk.input_ids.device
        if chunk.packing is None and is_compiled(self.backbone):
            chunk = plain_shape(chunk, pad_id=self.pad_id)
        with (
            torch.autocast(device.type, dtype=self.autocast_dtype)
            if self.autocast_dtype is not None
            else nullcontext(),
            known_padding(padded=chunk.padded),
        ):
            if chunk.packing is None:
                hidden: Tensor = self.backbone(
                    input_ids=chunk.input_ids, attention_mask=chunk.attention_mask, **options
                ).last_hidden_state
            else:
                hidden = run_packed(self.backbone, chunk.input_ids, chunk.packing, **options)
        # What follows is where low precision would cost, and is cheap.
        return hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) else hidden

    def make_chunks(
        self, texts: Texts, tokens_per_chunk: int
    ) -> tuple[list[TextRows], list[Chunk]]:
        """Return the rows of each chunk and the chunks, packed or padded as is faster here.

        Args:
            texts: Any number of texts.
            tokens_per_chunk: Most tokens in a chunk, padding included.
        """
        plan, chunks = self.lazy_chunks(texts, tokens_per_chunk)
        return plan, list(chunks)

    def make_token_chunks(
        self, texts: Texts, targets: Mapping[str, IntArray | Int64Array], tokens_per_chunk: int
    ) -> list[TokenChunk]:
        """Return chunks as `make_chunks` does, each with what is to be predicted of its tokens.

        Args:
            texts: Any number of texts.
            targets: By name, a number for each of their tokens.
            tokens_per_chunk: Most tokens in a chunk, padding included.
        """
        made = []
        for rows, chunk in zip(*self.make_chunks(texts, tokens_per_chunk), strict=True):
            own = texts.take(rows)
            tokens = texts.token_places(rows)
            laid_out = {
                name: lay_out(values[tokens], own, chunk, fill=IGNORED)
                for name, values in targets.items()
            }
            made.append(
                TokenChunk(
                    chunk,
                    {name: to_device(grid, self.device) for name, grid in laid_out.items()},
                    {
                        name: to_device(np.flatnonzero(grid != IGNORED), self.device)
                        for name, grid in laid_out.items()
                    },
                    own.lengths,
                )
            )
        return made

    def lazy_chunks(
        self, texts: Texts, tokens_per_chunk: int
    ) -> tuple[list[TextRows], Iterator[Chunk]]:
        """Return what `make_chunks` does, each chunk made when its turn comes."""
        multiple = length_multiple(self.backbone, self.device, self.autocast_dtype)
        plan = plan_chunks(texts.lengths, tokens_per_chunk, multiple=multiple)
        if self.can_pack and (self.packing == "on" or self._is_worth_packing(texts, plan)):
            plan = plan_chunks(texts.lengths, tokens_per_chunk, packed=True)
            return plan, pack_chunks(
                texts,
                plan,
                pad_id=self.pad_id,
                device=self.device,
                skipped_position=skipped_position(self.backbone),
            )
        return plan, pad_chunks(
            texts, plan, pad_id=self.pad_id, device=self.device, multiple=multiple
        )

    @property
    def can_pack(self) -> bool:
        """Whether chunks may be packed, by the option `packing`, the backbone and the device."""
        if self.packing == "off":
            return False
        dtype = self.autocast_dtype or self.dtype
        reason = why_not_packable(self.backbone, self.device, dtype)
        if is_compiled(self):
            reason = "torch.compile would compile anew for the lengths of each chunk"
        if reason is None:
            return True
        if not self._told_why_padded:
            level = logging.WARNING if self.packing == "on" else logging.INFO
            log.log(level, "texts are padded, not packed: %s", reason)
            self._told_why_padded = True
        return False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embeddings."""
        dtype = next(self.backbone.parameters()).dtype
        return torch.float64 if dtype == torch.float64 else torch.float32

    @property
    def pad_id(self) -> int:
        """Token id that fills the padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def pooling_options(self) -> dict[str, Any]:
        """The options of `pooling` that are in force, but for mode and normalize."""
        return options_of(self.pooling, self.head)

    def tokenize(self, texts: Sequence[str], *, side: str) -> tuple[Texts, int]:
        """Return the tokens of texts of one side as in training, and how many texts were cut."""
        return tokenize(
            self.tokenizer,
            texts,
            prompt=self.text.prompt(side),
            max_tokens=self.text.max_tokens(side),
        )

    def encode(
        self,
        texts: Sequence[str],
        *,
        side: str = "document",
        truncate_dim: int | None = None,
        tokens_per_chunk: int = 16384,
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Return the embeddings of texts, float32 `[n, d]`, in their order.

        Args:
            texts: Any number of texts. Where their embeddings are too many to hold, use `embed`.
            side: query or document: whose prompt is put before each text.
            truncate_dim: How many of an embedding's first numbers are given, at unit length if the
                model's have it (Matryoshka). None: all.
            tokens_per_chunk: Most padded tokens that go through the model at once.
            progress: Whether to show a progress bar.

        Raises:
            UserError: As `embed`.
        """
        if isinstance(texts, str):
            raise UserError("encode takes a list of texts, not one string")
        out = np.empty((len(texts), truncate_dim or self.embedding_width), np.float32)
        first = 0
        for part in self.embed(
            texts,
            side=side,
            truncate_dim=truncate_dim,
            tokens_per_chunk=tokens_per_chunk,
            progress=progress,
        ):
            out[first : first + len(part)] = part
            first += len(part)
        return out

    def embed(
        self,
        texts: Iterable[str],
        *,
        side: str = "document",
        truncate_dim: int | None = None,
        tokens_per_chunk: int = 16384,
        progress: bool = False,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the embeddings of texts slice by slice, each float32 `[some, d]`, in their order.

        Neither host nor device holds more than a slice (see `SLICE_BYTES` in embed.py), so the
        texts may come from a generator. Inside a slice they are sorted by length.

        Args:
            texts: Any number of texts.
            side: query or document: whose prompt is put before each text.
            truncate_dim: How many of an embedding's first numbers are given, at unit length if the
                model's have it (Matryoshka). None: all.
            tokens_per_chunk: Most padded tokens that go through the model at once.
            progress: Whether to show a progress bar.

        Raises:
            UserError: An embedding is not finite, or all zeros though its text has tokens; the
                device has too little memory for a chunk; or embeddings have fewer numbers than
                `truncate_dim`.
        """
        if truncate_dim is not None and not 0 < truncate_dim <= self.embedding_width:
            raise UserError(
                f"truncate_dim={truncate_dim}: the model's embeddings have "
                f"{self.embedding_width} numbers; ask for 1 to {self.embedding_width}"
            )
        return embed_slices(
            self,
            texts,
            side=side,
            truncate_dim=truncate_dim,
            tokens_per_chunk=tokens_per_chunk,
            progress=progress,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `SentenceTransformer(folder)` and `from_pretrained` load.

        Weights that are not finite are told in a warning; `from_pretrained` refuses them.
        """
        damaged = damaged_weight(self)
        if damaged is not None:
            log.warning("%s: the weight %s has values that are not finite", folder, damaged)
        save_sentence_transformer(self._parts(), Path(folder))

    def save_settings(self, folder: Path) -> None:
        """Write the same folder but for the weights, for `from_settings`."""
        save_settings(self._parts(), folder)

    def _parts(self) -> Parts:
        return Parts(
            self.backbone,
            self.tokenizer,
            self.pooling,
            self.head,
            self.normalize,
            self.lower_case,
            self.text,
        )

    def _is_worth_packing(self, texts: Texts, plan: list[TextRows]) -> bool:
        if self.device.type == "cuda":
            return True
        padded = sum(len(rows) * int(texts.lengths[rows[0]]) for rows in plan)
        return padded > (1 + WORTH_PACKING) * int(texts.lengths.sum())
