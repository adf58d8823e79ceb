"""Train a model, and see how well it predicts texts longer than it trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pallas_attn.demo.model import CharacterModel
from pallas_attn.demo.text import batches, Text, windows


@dataclass(frozen=True)
class Settings:
    """How long and on what a model is trained.

    Args:
        steps: Optimiser steps.
        batch: Windows in a batch.
        length: Characters in a window.
        learning_rate: The largest, after a warm-up; then a cosine to a tenth.
        seed: Of the parameters and of the windows; the same for both models.
        lengths: Evaluated lengths, as multiples of `length`.
        characters: Held-out characters that an evaluation reads.
    """

    steps: int = 500
    batch: int = 16
    length: int = 128
    learning_rate: float = 4e-3
    seed: int = 0
    lengths: tuple[int, ...] = (1, 2, 4)
    characters: int = 16384


@dataclass(frozen=True)
class Trained:
    """A trained model: its loss at every step, and held-out at every multiple."""

    parameters: Any
    losses: list[float]
    held_out: dict[int, float]

    @property
    def start(self) -> float:
        """Loss of the first step, before anything was learned."""
        return self.losses[0]

    @property
    def end(self) -> float:
        """Mean loss of the last tenth of the steps."""
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))

    @property
    def halved(self) -> bool:
        """Whether the loss fell below half of its start."""
        return self.end < self.start / 2


def train(
    model: CharacterModel,
    text: Text,
    settings: Settings,
    on_step: Callable[[float], None],
) -> Trained:
    """Adam on random windows of the training text, then the held-out losses.

    Args:
        model: The model.
        text: What it learns from.
        settings: How long, on what.
        on_step: Called after every step with its loss, in nats for a character.

    Returns:
        The trained model.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=min(20, settings.steps),
        decay_steps=max(settings.steps, 21),
        end_value=settings.learning_rate / 10,
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss_of(parameters: Any, window: Int[Array, "B T"]) -> Float[Array, ""]:
        logits: Any = model.apply(parameters, window[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, window[:, 1:]
        ).mean()

    @jax.jit
    def step(
        parameters: Any, state: Any, window: Int[Array, "B T"]
    ) -> tuple[Any, Any, Float[Array, ""]]:
        loss, gradient = jax.value_and_grad(loss_of)(parameters, window)
        update, state = optimiser.update(gradient, state, parameters)
        return optax.apply_updates(parameters, update), state, loss

    drawn = batches(text.training, settings.batch, settings.length, settings.seed)
    parameters = model.init(jax.random.key(settings.seed), next(drawn)[:, :-1])
    state = optimiser.init(parameters)
    losses = []
    for window in itertools.islice(drawn, settings.steps):
        parameters, state, loss = step(parameters, state, window)
        losses.append(float(loss))
        on_step(losses[-1])

    held_out = {}
    for multiple in settings.lengths:
        at_length = windows(
            text.held_out, settings.characters, multiple * settings.length
        )
        held_out[multiple] = float(jax.jit(loss_of)(parameters, jnp.asarray(at_length)))
    return Trained(parameters, losses, held_out)
