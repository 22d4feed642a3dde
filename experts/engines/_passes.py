"""Forward passes of the base model over left-padded rows, each with its own experts."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from xpert.errors import BadInput
from xpert.experts.adapters import Adapter
from xpert.experts.engines._kv_cache import RowCache, begin, check_cacheable
from xpert.experts.engines._lora_layers import applied
from xpert.experts.engines._lora_plan import COSTS, Plan, Planner, RowMixture
from xpert.experts.engines._prefixes import PrefixStore
from xpert.language_model import LanguageModel

__all__ = ["Passes"]


class Passes:
    """The base model as the engine uses it. One pass at a time, whichever threads ask."""

    def __init__(self, lm: LanguageModel, *, prefix_bytes: int = 0, stack_bytes: int | None = None) -> None:
        self.model = lm.model.eval()
        self.device = lm.device
        self.config = self.model.config
        check_cacheable(self.config, where=lm.ref)
        self.planner = Planner(COSTS.get(self.device.type, COSTS["cuda"]), keep_bytes=stack_bytes)
        self.prefixes = PrefixStore(prefix_bytes)
        text_config = self.config.get_text_config()
        self.context: int = getattr(text_config, "max_position_embeddings", None) or 2**31
        self.ends: frozenset[int] = lm.stop_ids
        self.vocabulary: int = self.model.get_input_embeddings().num_embeddings
        self._lock = threading.Lock()

    def prefill(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[RowMixture], heads: Sequence[RowCache | None] = ()
    ) -> tuple[torch.Tensor, RowCache]:
        """Logits after each prompt [rows, vocabulary], and the cache. `rows` must be sorted by `row_order`.

        `heads[t]`: keys and values of some first tokens of prompt t, computed before with the same experts (one row,
        no padding). What they spare is what they spare the row that they spare least: all rows compute equally many
        tokens, so that none needs a hole.
        """
        longest = max(map(len, prompts))
        heads = heads or [None] * len(prompts)
        known = [min(head.width, len(prompt) - 1) if head else 0 for head, prompt in zip(heads, prompts, strict=True)]
        fresh = max(len(prompt) - count for prompt, count in zip(prompts, known, strict=True))
        ids = [[0] * (fresh - len(prompt)) + list(prompt[-fresh:]) for prompt in prompts]
        if fresh < longest:
            counts = [max(0, len(prompt) - fresh) for prompt in prompts]
            cache = begin(heads, counts, longest - fresh, self.config)
            for count in counts:
                if count:
                    self.prefixes.used(count)
        else:
            cache = RowCache(self.config)
        plan = self.planner.make_plan(rows, fresh)
        pads = [longest - len(prompt) for prompt in prompts]
        logits = self.forward(torch.tensor(ids, device=self.device), pads, plan, cache)
        return logits[:, -1], cache

    def forward(
        self, ids: torch.Tensor, pads: Sequence[int], plan: Plan, cache: RowCache, keep: int = 1
    ) -> torch.Tensor:
        """Feeds `ids` [rows, tokens] behind what the cache holds, which grows by them.

        `pads` counts the padding at the left of each row, cache and ids together. Returns the logits of the last `keep`
        positions, [rows, keep, vocabulary].
        """
        total = cache.width + ids.shape[1]
        pad = torch.tensor(pads, device=self.device)[:, None]
        mask = torch.arange(total, device=self.device)[None] >= pad
        positions = (torch.arange(total - ids.shape[1], total, device=self.device)[None] - pad).clamp(min=0)
        with self._lock, torch.inference_mode(), applied(self.model, plan):
            output = self.model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: torch.Tensor = output.logits
        return logits

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The base's last hidden states [rows, tokens, d] of right-padded rows, without experts and output head."""
        with self._lock, torch.inference_mode():
            output = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def forget(self, adapter: Adapter) -> None:
        """Frees what is made of an adapter that has left the device."""
        self.planner.forget(adapter)

    def check_prompt(self, prompt: Sequence[int], *, where: str, room: int = 1) -> None:
        """Raises BadInput unless the prompt leaves `room` tokens of the context, and holds only known tokens."""
        if not prompt:
            raise BadInput("the prompt is empty", where=where)
        if len(prompt) + room > self.context:
            coming = f", with the {room} to come" if room else ""
            raise BadInput(
                f"the prompt has {len(prompt):,} tokens; the context of the base model holds {self.context:,}{coming}",
                where=where,
                hint="shorten the prompt",
            )
        if not (min(prompt) >= 0 and max(prompt) < self.vocabulary):
            raise BadInput(
                f"the prompt holds a token outside 0..{self.vocabulary - 1}",
                where=where,
                hint="use the base's tokenizer",
            )
