"""All policies by name, with options as users write them: "k=v,k2=v2"."""

from adacache import AdaCache
from deltacache import DeltaCache
from easycache import EasyCache
from interval import Interval
from magcache import MagCache
from parts import Fora, HiCache, Pab, SpeCa, TaylorSeer
from probe import DbCache, FbCache
from spectrum import Spectrum
from teacache import TeaCache
from tokens import DiffSparse, DuCa, ToCa
from worldcache import WorldCache

POLICIES = {
    "interval": Interval, "teacache": TeaCache, "easycache": EasyCache, "magcache": MagCache, "spectrum": Spectrum,
    "adacache": AdaCache, "worldcache": WorldCache, "fbcache": FbCache, "dbcache": DbCache, "deltacache": DeltaCache,
    "fora": Fora, "taylorseer": TaylorSeer, "hicache": HiCache, "speca": SpeCa, "pab": Pab, "toca": ToCa, "duca": DuCa,
    "diffsparse": DiffSparse,
}
# words that Python keeps for itself, or that would hide something
RENAMED = {"lambda": "ridge", "self": "self_range", "mlp": "mlp_range"}


def value(text):
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def make(run, policy, options):
    pairs = (pair.split("=", 1) for pair in options.split(",") if pair)
    return POLICIES[policy](run, **{RENAMED.get(k, k): value(v) for k, v in pairs})
