"""The method table: to add a method, a row here, its rule or spec, and a case in the tests."""

from __future__ import annotations

from fastmerge.methods import combination, consensus, pointwise
from fastmerge.methods.shapes import Combination, Consensus, Pointwise, Spans
from fastmerge.methods.types import DARE, REQUIRED, TASK_ARITHMETIC, TIES, Method, Parameter


def _weight(default: object = REQUIRED) -> Parameter:
    return Parameter("weight", float, default, "the model's relative weight", per_model=True)


# A density of 0 leaves a model out, as in mergekit.
_DENSITY = Parameter(
    "density", float, 1.0, "fraction of delta entries kept", per_model=True, low=0, high=1
)


def _flag(name: str, default: bool, doc: str) -> Parameter:
    return Parameter(name, bool, default, doc)


T = Parameter(
    "t", float, REQUIRED, "0 gives the base model, 1 the other", low=-1, high=2, fraction=True
)
_INT8_MASK = _flag("int8_mask", False, "accepted for mergekit's recipes; no effect")
_LAMBDA = Parameter("lambda", float, 1.0, "factor on the merged delta before the base is added")
_RESCALE = (("l1", True), ("none", False))
_DIVISOR = Parameter(
    "divisor", str, "weights", "what normalize divides by: the weights' sum, or how many took part",
    choices=("weights", "count"),
)  # fmt: skip
_VOTES = Parameter(
    "votes", str, "weighted",
    "what elects a sign: the sum of weighted deltas, of the deltas as they are, or of their signs",
    choices=("weighted", "plain", "frequency"),
)  # fmt: skip


def _task(
    normalize: bool,
    rescale: bool,
    *,
    density: bool = True,
    elect: bool = False,
) -> tuple[Parameter, ...]:
    sparse = (
        _DENSITY,
        Parameter(
            "rescale", bool, rescale,
            "after sparsifying restore each delta's L1 norm (l1, true), or divide by the density",
            choices=("density",), words=_RESCALE,
        ),
    )  # fmt: skip
    return (
        _weight(),
        *(sparse if density else ()),
        _flag("normalize", normalize, "divide by the sum of the weights that took part"),
        _DIVISOR,
        *((_VOTES,) if elect else ()),
        _LAMBDA,
        _INT8_MASK,
    )


_TRIM = (
    Parameter(
        "trim",
        str,
        "tensor",
        "what is trimmed to the density: each tensor, or a model's tensors as one (the paper)",
        choices=("tensor", "model"),
    ),
    Parameter(
        "ties",
        str,
        "mixed",
        "which of equal magnitudes stay: spread evenly, those of lowest index, or all of them",
        choices=("mixed", "index", "all"),
    ),
)

_ACTIVE = Parameter("epsilon", float, 1e-5, "a delta up to this size is no change", low=0)
_RAM = "arXiv:2601.13572"
_BREADCRUMBS = "Davari and Belilovsky 2023, arXiv:2312.06795"
_DELLA = "Deep et al. 2024, arXiv:2406.11617"
_EPSILON = Parameter(
    "epsilon", float, 0.15, "how far the chance to stay lies under and over the density in a row",
    per_model=True, low=0,
)  # fmt: skip
_GAMMA = Parameter(
    "gamma", float, 0.01, "fraction of delta entries, the largest, that is dropped",
    per_model=True, low=0, high=1,
)  # fmt: skip

_ROWS: tuple[Method, ...] = (
    Combination(
        "linear", "weighted average", "Wortsman et al. 2022, arXiv:2203.05482",
        (_weight(), _flag("normalize", True, "divide by the sum of the weights")),
        base="operand", min_operands=1, max_operands=None,
        rule=combination.linear, needs_gram=False,
    ),
    Combination(
        "slerp", "spherical interpolation of two models",
        "Shoemake 1985, doi:10.1145/325165.325242",
        (T,),
        base="first", min_operands=2, max_operands=2, rule=combination.slerp, batched=True,
        of_one=combination.slerp_of_one,
    ),
    Combination(
        "nuslerp", "spherical interpolation with weights, of models or deltas; whole or by vector",
        "Shoemake 1985, doi:10.1145/325165.325242",
        (
            _weight(),
            _flag("nuslerp_flatten", True, "treat each tensor as one vector"),
            _flag("nuslerp_row_wise", False, "without flatten: vectors along the first axis"),
        ),
        base="optional", min_operands=2, max_operands=2,
        rule=combination.nuslerp, axis=combination.nuslerp_axis, batched=True,
    ),
    Combination(
        "multislerp", "barycentric spherical interpolation of many models",
        "tangent space at the normalised mean; as mergekit 0.1.5",
        (
            _weight(),
            _flag("normalize_weights", True, "divide the weights by their sum"),
            Parameter("eps", float, 1e-8, "below this a norm counts as zero", low=0),
        ),
        base="optional", min_operands=1, max_operands=None, rule=combination.multislerp,
    ),
    Combination(
        "karcher", "Riemannian (Karcher) mean on the sphere",
        "Grove and Karcher 1973, doi:10.1007/BF01214303",
        (
            Parameter("max_iter", int, 10, "most iterations", low=1),
            Parameter(
                "tol", float, 1e-5,
                "stop when the tangent step is shorter; a norm up to it has no direction", low=0,
            ),
        ),
        base="operand", min_operands=1, max_operands=None, rule=combination.karcher,
    ),
    Combination(
        "geometric_median", "the point with the least sum of distances to the models",
        "Weiszfeld 1937; Pillutla et al. 2022, arXiv:1912.13445",
        (
            _weight(1.0),
            Parameter("max_iter", int, 100, "most iterations", low=1),
            Parameter("tol", float, 1e-6, "stop when a step is shorter, in spreads", low=0),
        ),
        base="operand", min_operands=1, max_operands=None, rule=combination.geometric_median,
    ),
    Combination(
        "model_stock", "ratio of mean and base from the angle between deltas",
        "Jang et al. 2024, arXiv:2403.19522",
        (_flag("filter_wise", False, "one ratio for each row"),),
        base="required", min_operands=2, max_operands=None,
        rule=combination.model_stock, axis=combination.model_stock_axis, batched=True,
    ),
    Consensus(
        "task_arithmetic", "base plus the weighted sum of deltas",
        TASK_ARITHMETIC,
        _task(False, False, density=False),
        base="required", min_operands=1, max_operands=None, spec=consensus.task_arithmetic,
    ),
    Consensus(
        "ties", "trim deltas by magnitude, elect a sign, merge what agrees", TIES,
        (*_task(True, False, elect=True), *_TRIM),
        base="required", min_operands=1, max_operands=None, spec=consensus.ties,
        spans=Spans("trim", "model", alike=("density", "rescale", "ties")),
    ),
    Consensus(
        "dare_linear", "drop delta entries at random, rescale, add", DARE,
        _task(False, True),
        base="required", min_operands=1, max_operands=None, spec=consensus.dare_linear, random=True,
    ),
    Consensus(
        "dare_ties", "drop delta entries at random, rescale, elect a sign", DARE,
        _task(False, True, elect=True),
        base="required", min_operands=1, max_operands=None, spec=consensus.dare_ties, random=True,
    ),
    Consensus(
        "breadcrumbs", "drop the largest and the smallest delta entries, add", _BREADCRUMBS,
        (*_task(False, False), _GAMMA),
        base="required", min_operands=1, max_operands=None, spec=consensus.breadcrumbs,
    ),
    Consensus(
        "breadcrumbs_ties", "drop the largest and the smallest entries, elect a sign", _BREADCRUMBS,
        (*_task(False, False, elect=True), _GAMMA),
        base="required", min_operands=1, max_operands=None, spec=consensus.breadcrumbs_ties,
    ),
    Consensus(
        "della", "drop entries at random, small ones first; rescale, elect a sign", _DELLA,
        (*_task(True, True, elect=True), _EPSILON),
        base="required", min_operands=1, max_operands=None, spec=consensus.della, random=True,
    ),
    Consensus(
        "della_linear", "drop entries at random, small ones first; rescale, add", _DELLA,
        (*_task(False, True), _EPSILON),
        base="required", min_operands=1, max_operands=None, spec=consensus.della_linear,
        random=True,
    ),
    Pointwise(
        "sce", "select entries by variance, weigh models by squares, erase minority signs",
        "Wan et al. 2024, arXiv:2408.07990",
        (
            Parameter(
                "select_topk", float, 1.0, "fraction of the entries that vary that is kept",
                low=0, high=1,
            ),
            _INT8_MASK,
        ),
        base="required", min_operands=1, max_operands=None, formula=pointwise.sce,
        passes=pointwise.sce_passes, of_deltas=True,
    ),
    Pointwise(
        "ram", "sum what one model changed, average what several did", _RAM, (_ACTIVE,),
        base="required", min_operands=1, max_operands=None, formula=pointwise.ram, of_deltas=True,
    ),
    Pointwise(
        "ramplus_tl", "as ram, with what one model alone changed strengthened", _RAM,
        (
            Parameter("r", float, 0.1, "how much what is unique is strengthened"),
            Parameter("alpha", float, 0.2, "most of the ratio of shared to unique", low=0),
            _ACTIVE,
        ),
        base="required", min_operands=1, max_operands=None, formula=pointwise.ramplus_tl,
        passes=lambda values: 2, of_deltas=True, beside=1,
    ),
    Pointwise(
        "nearswap", "interpolate toward the other model where it is near", "-; as mergekit 0.1.5",
        (Parameter("t", float, REQUIRED, "the distance up to which entries are swapped", low=0),),
        base="required", min_operands=1, max_operands=1, formula=pointwise.nearswap, gain="t",
    ),
    Pointwise(
        "arcee_fusion", "take the entries that matter most by their row's divergence",
        "-; as mergekit 0.1.5, quantiles of all entries", (),
        base="required", min_operands=1, max_operands=1, formula=pointwise.arcee_fusion,
        passes=lambda values: 3,
    ),
    Pointwise(
        "magmax", "the delta of largest magnitude, entry by entry",
        "Marczak et al. 2024, arXiv:2407.06322", (_LAMBDA,),
        base="required", min_operands=1, max_operands=None, formula=pointwise.magmax,
        of_deltas=True, gain="lambda",
    ),
    Pointwise(
        "consensus_ta", "task arithmetic where the masks of several models agree",
        "Wang et al. 2024, arXiv:2405.07813",
        (
            _weight(1.0),
            Parameter(
                "mask_lambda", float, 0.4, "the larger, the fewer entries a model claims",
                per_model=True, low=0,
            ),
            Parameter("agree", int, 2, "how many models must claim an entry", low=1),
            _LAMBDA,
        ),
        base="required", min_operands=1, max_operands=None, formula=pointwise.consensus_ta,
        of_deltas=True, gain="lambda",
    ),
    Combination(
        "passthrough", "the tensor as it is, or scaled", "-",
        (Parameter("scale", float, None, "factor on the tensor", per_model=True),),
        base="none", min_operands=1, max_operands=1, rule=combination.passthrough, needs_gram=False,
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
