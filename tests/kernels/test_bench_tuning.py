"""Tuning: what comes to the final and what it says, with times that are made up."""

import copy
import dataclasses
import sys
import types

import pytest

from hmar_jax.scales import ScaleLadder
from pallas_kernels.scale_attention import scale_attention
from pallas_kernels.scale_attention.bench import cases, times, tuning


def setting(sides=(2,), size=8, dtype="float32"):
    return cases.Setting(ScaleLadder(sides), 1, 1, size, dtype, "block_diagonal", norm=False)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Those of two kernels, as tuning sees them."""

    forward: int
    backward: int


class TestTuning:
    @pytest.fixture
    def trials(self, monkeypatch):
        """Blocks → milliseconds, or what stops them, to the trials of a kernel with these candidates."""

        def try_all(chosen, milliseconds, spread=0.01):
            latest = []

            def attend(q, k, v, ranges, q_scale, *, blocks):
                latest[:] = [blocks]
                if isinstance(milliseconds[blocks], str):
                    raise ValueError(milliseconds[blocks])
                factor = 2 if blocks.forward == 99 else 1
                return factor * scale_attention(q, k, v, chosen.ladder, pattern=chosen.pattern, q_scale=q_scale)

            def time_calls(call, wait, repeats):
                seconds = 1e-3 * milliseconds[latest[0]]
                return times.Time(seconds, seconds * (1 - spread), seconds * (1 + spread))

            kernel = types.SimpleNamespace(candidates=lambda *_: list(milliseconds), hopper_attention=attend)
            monkeypatch.setitem(sys.modules, "pallas_kernels.scale_attention.hopper.attention", kernel)
            monkeypatch.setattr(times, "time_calls", time_calls)
            case = cases.make_case(chosen)
            return lambda blocks: list(tuning.trials("hopper", case, blocks, 1))

        return try_all

    def verdict(self, trials, chosen, milliseconds, **options):
        """And the blocks that came to the final."""
        run = trials(chosen, milliseconds, **options)
        last = tuning.finalists(run(list(tuning.candidates("hopper", chosen))[:4]))
        return tuning.verdict(run(last), "TUNED[1]"), last

    def test_the_best_of_each_kernel_are_joined_and_beat_what_is_in_use(self, trials):
        milliseconds = {Blocks(1, 1): 10, Blocks(2, 1): 9, Blocks(3, 1): 9.5, Blocks(1, 2): 8, Blocks(2, 2): 7}
        said, last = self.verdict(trials, setting(), milliseconds)
        assert last == [Blocks(1, 1), Blocks(1, 2), Blocks(2, 2)]
        assert said.startswith("42.9% faster (10 → 7 ms forward and backward): replace Blocks(forward=1, backward=1)")
        assert said.endswith("\nTUNED[1] = Blocks(forward=2, backward=2)")

    def test_a_difference_within_the_noise_changes_nothing(self, trials):
        said, _ = self.verdict(trials, setting(), {Blocks(1, 1): 10, Blocks(2, 1): 9.9})
        assert said.startswith("What is in use is best within the noise (10 → 9.9 ms")
        assert said.endswith("Blocks(forward=1, backward=1).")

    def test_nothing_wrong_or_broken_is_chosen(self, trials):
        milliseconds = {Blocks(1, 1): 10, Blocks(99, 1): 1, Blocks(1, 2): "too much shared memory", Blocks(1, 3): 11}
        said, last = self.verdict(trials, setting(), milliseconds)
        assert last == [Blocks(1, 1)]
        assert said == "Nothing right beats what is in use, Blocks(forward=1, backward=1)."
        tried = trials(setting(), milliseconds)(list(milliseconds))
        lines = [" ".join(tuning.line(trial, tried[0]).split()) for trial in tried]
        assert lines == [
            "1.000 10 ± 0.1 ms Blocks(forward=1, backward=1)",
            "wrong 1 ± 0.01 ms Blocks(forward=99, backward=1)",
            "absent Blocks(forward=1, backward=2): too much shared memory",
            "1.100 11 ± 0.1 ms Blocks(forward=1, backward=3)",
        ]

    @pytest.mark.parametrize("kernel", ["hopper", "tpu", "triton"])
    def test_candidates_are_distinct_and_can_be_pasted_as_they_are_printed(self, kernel):
        if kernel == "triton":
            pytest.importorskip("jax_triton")
        found = tuning.candidates(kernel, setting((1, 2, 30), size=64, dtype="bfloat16"))
        assert len(set(found)) == len(found) > 4
        for blocks in found:
            assert eval(repr(blocks), vars(sys.modules[type(blocks).__module__])) == blocks

    @pytest.mark.parametrize("kernel", ["hopper", "tpu", "triton"])
    @pytest.mark.parametrize("sides", [(1, 2, 30), (60,), (1, 90)], ids=str)
    def test_an_entry_set_as_it_is_printed_is_what_is_used(self, kernel, sides, monkeypatch):
        if kernel == "triton":
            pytest.importorskip("jax_triton")
        chosen = setting(sides, size=64, dtype="bfloat16")
        used, other = tuning.candidates(kernel, chosen)[:2]
        module = sys.modules[type(used).__module__]
        table = copy.deepcopy(module.TUNED)
        if hasattr(module, "DEFAULT_KIND"):
            table["cpu"] = dict(table[module.DEFAULT_KIND])
        monkeypatch.setattr(module, "TUNED", table)
        exec(f"{tuning.table_entry(kernel, chosen)} = {other}", vars(module))
        assert tuning.candidates(kernel, chosen)[0] == other

    def test_what_is_in_use_and_fails_is_replaced(self, trials):
        said, _ = self.verdict(trials, setting(), {Blocks(1, 1): "broken", Blocks(2, 1): 9})
        assert "does not work here; use\nTUNED[1] = Blocks(forward=2, backward=1)" in said
