"""Planted bugs: each takes the real function and returns a wrong one."""

import math

import jax
import jax.numpy as jnp

from jetflow.flows.pixels import FEATURE_ORDERS


def negative_logdet(real):
    def wrong(*args):
        value, logdet = real(*args)
        return value, -logdet

    return wrong


def mean_logdet(real):
    def wrong(*args):
        value, logdet = real(*args)
        return value, logdet / value[0].size

    return wrong


def no_logdet(real):
    def wrong(*args):
        value, logdet = real(*args)
        return value, 0 * logdet

    return wrong


def sigmoid_alone(real):
    return lambda x, bias, gate, limit: (real(x, bias, gate, limit)[0], real(x, bias, gate, 1.0)[1])


def merge_without_inverting(real):
    def wrong(x1, x2, split):
        feature_order = jnp.argsort(split.feature_order)
        return real(x1, x2, split._replace(feature_order=feature_order))

    return wrong


def merge_with_halves_swapped(real):
    return lambda x1, x2, split: real(x2, x1, split)


def unpatchify_with_the_order_of_patchify(real):
    def wrong(self, tokens):
        x = tokens.reshape(-1, *self.grid, 2, 2, self.image_shape[2])
        return x.transpose(FEATURE_ORDERS["chw"]).reshape(-1, *self.image_shape)

    return wrong


def in_order_of_the_layers(real):
    return lambda self, body, x, reverse: real(self, body, x, reverse=False)


def without_shift_by_one_token(real):
    def wrong(self, x, label):
        hidden = self.proj_in(x) + self._in_order(self.position[None])
        return self._split(self.proj_out(self.transformer(hidden)))

    return wrong


def _attend(query, key, value, visible):
    logits = jnp.einsum("bsnh,btnh->bnst", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible > 0, logits, -jnp.inf))
    return jnp.einsum("bnst,btnh->bsnh", weights, value)


def attend_to_the_next_token(real):
    return lambda query, *args: _attend(query, *args[:2], jnp.tri(query.shape[1], k=1))


def attend_to_oneself_alone(real):
    return lambda query, *args: _attend(query, *args[:2], jnp.eye(query.shape[1]))


def always_in_image_order(real):
    return lambda self, tokens: tokens


def cache_written_one_too_late(real):
    return lambda self, x, cache, start, temperature: real(self, x, cache, start + 1, temperature)


def minus_one_is_the_last_class(real):
    def wrong(embedding, null, label, batch):
        return real(embedding, null, None if label is None else label % len(embedding), batch)

    return wrong


def same_label_for_all(real):
    def wrong(embedding, null, label, batch):
        return real(embedding, null, None if label is None else 0 * label, batch)

    return wrong
