"""What hypothesis draws: scores, masks, moments, prompts; and how many of each it tries."""

import os
from functools import lru_cache

import torch
from helpers_units import INFO
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ssah_nb.attribution import Importance
from ssah_nb.engine.models import ARCHITECTURES, MIXTURES, tiny_model
from ssah_nb.units import CLASSES, Scores, UnitMap, UnitMask, depth_two

SLOWLY = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("suite", max_examples=100, derandomize=True, **SLOWLY)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **SLOWLY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def fewer(by: int) -> settings:
    "For a property whose every example costs much: so many times fewer examples."
    return settings(max_examples=max(4, settings.default.max_examples // by))


# finite float32 numbers of every size whose squares are still finite, and many that are equal
NUMBERS = st.one_of(
    st.sampled_from([-1.0, 0.0, 1.0]),
    st.integers(-3, 3).map(float),
    st.floats(-(2.0**30), 2.0**30, width=32),
)
SHARES = st.one_of(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), st.floats(0, 1))


def tensors(*shape: int, of=NUMBERS, dtype=torch.float32):
    "Tensors of a shape, filled from a strategy, or with one value throughout."
    size = torch.Size(shape).numel()
    filled = st.one_of(st.lists(of, min_size=size, max_size=size), of.map(lambda x: [x] * size))
    return filled.map(lambda values: torch.tensor(values, dtype=dtype).view(shape))


@st.composite
def importances(draw, count: int = 2):
    "Importances of one made-up model: 1 to 3 layers, any scores."
    layers, channels = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    heads, width = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    info = INFO | {"model": INFO["model"] | {"heads": heads, "layers": layers}}
    info["total"] = layers * (channels * 96 + heads * 768) * draw(st.sampled_from([1, 2, 10]))
    made = []
    for _ in range(count):
        raw = {"mlp": draw(tensors(layers, channels))}
        raw["attention"] = draw(tensors(layers, heads * width))
        made.append(Importance(raw, {"mlp": [], "attention": []}, dict(info)))
    return made


def layered(rows: int, columns: int):
    "Bool tensors whose every row is random by itself, empty or full."
    row = st.one_of(
        st.sampled_from([[False] * columns, [True] * columns]),
        st.lists(st.booleans(), min_size=columns, max_size=columns),
    )
    return st.lists(row, min_size=rows, max_size=rows).map(torch.tensor)


@st.composite
def masks(draw, count: int = 1, shapes=None, model=None):
    "Masks of one made-up model, or of the given shapes (of channels, of heads)."
    sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4))
    layers, channels, heads = draw(sizes)
    mlp, attention = shapes or ((layers, channels), (layers, heads))
    made = [UnitMask(draw(layered(*mlp)), draw(layered(*attention)), model) for _ in range(count)]
    return made if count > 1 else made[0]


@st.composite
def unit_maps(draw, count: int = 1):
    "Maps of one made-up model with any classes and any order."
    layers, channels, heads = (draw(st.integers(1, n)) for n in (3, 9, 4))
    codes, shapes = st.integers(0, len(CLASSES) - 1), ((layers, channels), (layers, heads))
    made = []
    for _ in range(count):
        parts = [draw(tensors(*shape, of=codes, dtype=torch.uint8)) for shape in shapes]
        order = Scores(*(draw(tensors(*shape)) for shape in shapes))
        made.append(UnitMap(*parts, order, dict(INFO)))
    return made if count > 1 else made[0]


@lru_cache(maxsize=None)
def model_of(architecture: str, groups: int = 2, dtype: torch.dtype = torch.float32):
    "A tiny model that a test may change, but must leave as it was."
    return tiny_model(architecture, num_key_value_heads=groups).to(dtype)


@st.composite
def models_with_masks(draw, architectures=ARCHITECTURES + MIXTURES, dtypes=(torch.float32,)):
    "A tiny model of some architecture, and any mask of it."
    name, groups = draw(st.sampled_from(architectures)), draw(st.sampled_from([1, 2, 4]))
    model = model_of(name, groups, draw(st.sampled_from(dtypes)))
    shapes = [(len(m), m[0].units) for m in depth_two(model).values()]
    return model, draw(masks(shapes=shapes))
