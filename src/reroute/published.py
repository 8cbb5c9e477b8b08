"""Methods and schedules by name: which layers decide, with which shape, and the ratios that the papers print.

Sources: Reroute, arXiv 2606.12412; FastV, arXiv 2403.06764; PyramidDrop, arXiv 2410.17247; Nüwa, arXiv 2602.02951;
and their public code. A name says whose numbers these are, never what they cost: the plan prints the measured average.
"""

from __future__ import annotations

from dataclasses import dataclass

# The layers below are those of LLaVA-1.5-7B. The papers' schedules for Qwen2.5-VL (28 layers) are these layers scaled
# and rounded to the nearest: 3 | 2, 7, 15, 23 of 32 become 3 | 2, 6, 13, 20 of 28.
DEPTH = 32
_FASTV, _REROUTE_FASTV, _PDROP = (3,), (3, 7, 15, 23), (2, 7, 15, 23)
_NUWA, _REROUTE_NUWA = (16,), (16, 20, 24, 28)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method without its budget: `METHOD:avg=1/9` is a whole spec. Layers are of a decoder of `DEPTH` layers."""

    action: str
    layers: tuple[int, ...]
    options: tuple[str, ...]

    def at(self, num_layers: int) -> tuple[int, ...]:
        """The decision layers for a decoder of another depth; two that fall together are one."""
        return tuple(sorted({round(layer * num_layers / DEPTH) for layer in self.layers}))


# The pairs compare at equal averages. FastV and PyramidDrop score as the Reroute code does (score=own); the authors'
# own forms are options: `fastv:score=previous`, `pdrop:positions=renumbered`. reroute-nuwa is this project's design:
# the published code has no such variant.
METHODS: dict[str, Method] = {
    "fastv": Method(action="removal", layers=_FASTV, options=("shape=uniform",)),
    "reroute-fastv": Method(action="reroute", layers=_REROUTE_FASTV, options=("shape=uniform",)),
    "pdrop": Method(action="removal", layers=_PDROP, options=("shape=geometric",)),
    "reroute-pdrop": Method(action="reroute", layers=_PDROP, options=("shape=halving",)),
    "nuwa": Method(action="removal", layers=_NUWA, options=("shape=uniform", "score=previous", "nuwa=auto")),
    "reroute-nuwa": Method(action="reroute", layers=_REROUTE_NUWA, options=("shape=uniform", "nuwa=auto")),
}


def _layers(layers: tuple[int, ...], depth: int) -> str:
    return ",".join(str(round(layer * depth / DEPTH)) for layer in layers)


def _published() -> dict[str, str]:
    """Name -> spec, ratios as printed. The rows avg64 of the pdrop pair measure 80.4 and 84.1 tokens, not 64."""
    fastv = {192: ".2644", 128: ".1418", 64: ".01916"}
    pdrop = {192: ".5965,.3558,.2123,.1266", 128: ".4570,.2088,.0954,.0436", 64: ".2789,.0937,.0315,.0106"}
    reroute = {192: ".4502,.4502,.2251,.1126", 128: ".2655,.2655,.1328,.0664", 64: ".1392,.1392,.0696,.0348"}
    nuwa = {192: (336, 48), 128: (224, 32), 64: (112, 16)}
    specs: dict[str, str] = {}
    for model, depth in (("llava15", 32), ("qwen25", 28)):
        for tier in (192, 128, 64):
            four = ",".join([fastv[tier]] * 4)
            specs |= {
                f"{model}/avg{tier}/fastv": f"removal@{_layers(_FASTV, depth)}:keep={fastv[tier]}",
                f"{model}/avg{tier}/reroute-fastv": f"reroute@{_layers(_REROUTE_FASTV, depth)}:keep={four}",
                f"{model}/avg{tier}/pdrop": f"removal@{_layers(_PDROP, depth)}:keep={pdrop[tier]}",
                f"{model}/avg{tier}/reroute-pdrop": f"reroute@{_layers(_PDROP, depth)}:keep={reroute[tier]}",
            }
    for tier, (first, second) in nuwa.items():
        specs[f"llava15/avg{tier}/nuwa"] = f"removal@16:nuwa={first}:keep={second}:score=previous"
    # Nüwa's code for Qwen2.5-VL: 35 % leave the tower and 42 % of those stay behind layer 14, which are shares of the
    # image's tokens here. The names are the code's own, keep_ratio in percent.
    for percent, (first, second) in {25: (".35", ".147"), 50: (".6", ".396"), 75: (".85", ".595")}.items():
        scored = "score=previous:rows=3:heads=max"
        specs[f"qwen25/keep{percent}/nuwa"] = f"removal@15:nuwa={first}:keep={second}:{scored}"
    # The defaults of the methods' own code for LLaVA-1.5-7B.
    for percent, keep in (("50", ".5"), ("75", ".25")):
        specs[f"llava15/authors/fastv-r{percent}"] = f"removal@3:keep={keep}:score=previous"
    specs["llava15/authors/pdrop"] = "removal@8,16,24:keep=.5,.25,.125:positions=renumbered"
    return specs


PUBLISHED: dict[str, str] = _published()
