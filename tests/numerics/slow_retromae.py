"""RetroMAE, DupMAE and MLM as their papers write them: one text at a time, one token at a time."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from largebatch.batch import Texts
from largebatch.model.chunks import pad_chunks
from largebatch.step.masking import mask_texts, text_keys, visible_tokens


def masks_of(objective, texts, step=0):
    """Return the masked texts and what the decoder's tokens see, for each text alone."""
    packed = Texts.from_lists(texts)
    share = getattr(objective, "mask_share", objective.options.mask_share)
    keys = text_keys(packed, seed=objective.seed, step=step)
    masked = mask_texts(packed, objective.words, keys, share=share, replacing=objective.replacing)
    parts = objective.words.parts(packed)
    found = []
    for row, (start, length) in enumerate(zip(packed.starts, packed.lengths, strict=True)):
        own = slice(start, start + length)
        visible = None
        if hasattr(objective, "retro"):
            visible = visible_tokens(
                keys[row : row + 1],
                torch.from_numpy(parts[own][None].astype(np.int64)),
                torch.tensor([length]),
                objective.retro.decoder_mask_share,
                pool=objective.retro.decoder_masks,
            )[0]
        found.append((masked.texts.tokens[own], masked.targets[own], visible))
    return found


def hidden_states(encoder, tokens):
    """Return the encoder's states of one text."""
    one = Texts(np.asarray(tokens, np.int32), np.array([len(tokens)], np.int32))
    (chunk,) = pad_chunks(one, [np.array([0])], pad_id=encoder.pad_id, device=encoder.device)
    return encoder.hidden_states(chunk)[0]


def surprise(objective, encoder, state, token):
    """Return the cross entropy of one token, with all logits."""
    logits = logits_of(objective, encoder, state)
    return -F.log_softmax(logits, 0)[token]


def logits_of(objective, encoder, state):
    words = encoder.backbone.get_input_embeddings().weight
    return words @ objective.head(state) + objective.head.bias


def plain_mlm(objective, encoder, texts, step=0):
    """Return the mean over masked tokens."""
    losses = []
    for hidden, targets, _ in masks_of(objective, texts, step):
        states = hidden_states(encoder, hidden)
        losses += [
            surprise(objective, encoder, states[i], int(token))
            for i, token in enumerate(targets)
            if token >= 0
        ]
    return sum(losses) / len(losses)


def plain_retromae(objective, encoder, texts, step=0):
    """Return L_enc + L_dec (+ w L_bow), by loops over texts, positions and heads."""
    of_encoder, of_decoder, of_bags = [], [], []
    embeddings = encoder.backbone.embeddings
    first_position = (
        0
        if embeddings.position_embeddings.padding_idx is None
        else (embeddings.position_embeddings.padding_idx + 1)
    )
    retro, layer = objective.retro, objective.decoder
    for tokens, (hidden, targets, visible) in zip(
        texts, masks_of(objective, texts, step), strict=True
    ):
        states = hidden_states(encoder, hidden)
        of_encoder += [
            surprise(objective, encoder, states[i], int(token))
            for i, token in enumerate(targets)
            if token >= 0
        ]
        length = len(tokens)
        if length > 2:
            logits = torch.stack([logits_of(objective, encoder, s) for s in states[1:]])
            logs = F.log_softmax(logits.max(0).values, 0)
            of_bags.append(-sum(logs[token] for token in set(tokens[1:-1])) / (length - 2))

        def embed(word, i):
            position = embeddings.position_embeddings.weight[i + first_position]
            types = getattr(embeddings, "token_type_embeddings", None)
            kind = 0 if types is None else types.weight[0]
            return embeddings.LayerNorm(word + position + kind)

        sentence = states[0]
        asking = [
            embed(sentence, i)
            if retro.queries == "embedded"
            else sentence + embeddings.position_embeddings.weight[i + first_position]
            for i in range(length)
        ]
        seen = [sentence] + [
            embed(embeddings.word_embeddings.weight[tokens[i]], i) for i in range(1, length)
        ]
        for i in range(1, length - 1):
            query = layer.query(asking[i]).chunk(layer.heads)
            among = [j for j in range(length) if visible[i, j]]
            assert i not in among
            assert 0 in among
            found = []
            for head in range(layer.heads):
                keys = [layer.key(seen[j]).chunk(layer.heads)[head] for j in among]
                values = [layer.value(seen[j]).chunk(layer.heads)[head] for j in among]
                scores = torch.stack([query[head] @ key for key in keys])
                weights = F.softmax(scores / math.sqrt(len(query[head])), 0)
                found.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            attended = layer.attended_norm(layer.attended(torch.cat(found)) + asking[i])
            inner = layer.down(layer.activation(layer.up(attended)))
            state = layer.down_norm(inner + attended)
            of_decoder.append(surprise(objective, encoder, state, tokens[i]))
    loss = sum(of_encoder) / len(of_encoder) + sum(of_decoder) / len(of_decoder)
    if retro.bag_of_words_weight:
        loss = loss + retro.bag_of_words_weight * sum(of_bags) / len(of_bags)
    return loss
