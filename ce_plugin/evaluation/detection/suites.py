"""The attacks that detectors are tried against, fixed before any detector was looked at."""

from __future__ import annotations

from typing import Any

from ce_plugin.errors import unknown_name
from ce_plugin.evaluation.detection.attacks import AttackSpec

__all__ = ["fit_suite", "suite"]

_STRETCH = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


def suite(name: str) -> tuple[AttackSpec, ...]:
    """The attacks of the evaluation, cheap ones first.

    Caps are part of the settings: steps, queries and the number of images. Attacks that stop at the boundary are
    lengthened by the least factor that survives the rounding to eight bits; an attack with a bound is left as it is.

    Args:
        name: ``"small"`` for pictures of 28 x 28 (eps 0.1 and 0.3), ``"imagenet"`` for photographs (2, 4, 8 / 255).

    Raises:
        UnknownNameError: another suite.

    Example:
        >>> [spec.name for spec in suite("small")][:3]
        ['fgsm-0.1', 'fgsm-0.3', 'bim-0.1']
        >>> sum(spec.apart for spec in suite("small"))
        2

    Source: Goodfellow et al. 2015 (FGSM); Kurakin et al. 2017 (BIM); Madry et al. 2018 (PGD); Moosavi-Dezfooli et al.
    2016 (DeepFool); Carlini and Wagner 2017; Papernot et al. 2016 (JSMA); Chen et al. 2018 (ElasticNet); Andriushchenko
    et al. 2020 (Square); Chen et al. 2020 (HopSkipJump); Su et al. 2019, Vargas et al. 2019 (pixels); Croce and Hein
    2020 (AutoAttack); Engstrom et al. 2019 (spatial); Brown et al. 2017 (patch). All as in ART.
    """
    if name not in _SUITES:
        raise unknown_name("name", name, _SUITES)
    return _SUITES[name]


def fit_suite(name: str) -> tuple[AttackSpec, ...]:
    """What a detector may learn from where it learns from FGSM alone: the FGSM of a suite, on the images to fit on.

    Args:
        name: see :func:`suite`.

    Example:
        >>> [spec.name for spec in fit_suite("small")]
        ['fgsm-0.1', 'fgsm-0.3']
    """
    tries = {"small": 800, "imagenet": 450}
    return tuple(
        _sign(spec.name, spec.attack, spec.settings["eps"], tries[name], enough=tries[name], chunk=spec.chunk)
        for spec in suite(name)
        if spec.attack == "FastGradientMethod"
    )


def _sign(name: str, attack: str, eps: float, tries: int, enough: int, chunk: int, **settings: Any) -> AttackSpec:
    return AttackSpec(name, "sign", "linf", attack, {"eps": eps, **settings}, tries=tries, enough=enough, chunk=chunk)


def _bounded(bounds: dict[str, float], tries: int, enough: int, chunk: int) -> list[AttackSpec]:
    """FGSM, BIM and PGD for each bound."""
    made = []
    for attack, start in (("FastGradientMethod", 0), ("BasicIterativeMethod", 0), ("ProjectedGradientDescent", 1)):
        short = {"FastGradientMethod": "fgsm", "BasicIterativeMethod": "bim", "ProjectedGradientDescent": "pgd"}[attack]
        for words, eps in bounds.items():
            steps: dict[str, Any] = {}
            if short == "bim":
                steps = {"eps_step": eps / 10, "max_iter": 20}
            elif short == "pgd":
                steps = {"eps_step": eps / 16, "max_iter": 40, "num_random_init": start}
            made.append(_sign(f"{short}-{words}", attack, eps, tries, enough, chunk, **steps))
    return made


def _minimal(name: str, norm: str, attack: str, settings: dict[str, Any], **counts: Any) -> AttackSpec:
    return AttackSpec(name, "minimal", norm, attack, settings, stretch=_STRETCH, **counts)


def _query(name: str, norm: str, attack: str, settings: dict[str, Any], **counts: Any) -> AttackSpec:
    return AttackSpec(name, "query", norm, attack, settings, **counts)


_SMALL = (
    *_bounded({"0.1": 0.1, "0.3": 0.3}, tries=1000, enough=250, chunk=50),
    _minimal("deepfool", "l2", "DeepFool", {"max_iter": 50, "epsilon": 0.02}, tries=300, enough=250, chunk=50),
    AttackSpec(
        "jsma", "sparse", "l0", "SaliencyMapMethod", {"theta": 1.0, "gamma": 0.15},
        tries=400, enough=250, chunk=50, aims=True,
    ),
    *[
        _query(f"square-{eps}", "linf", "SquareAttack", {"eps": eps, "max_iter": 2000, "nb_restarts": 1},
               tries=600, enough=220, chunk=50)
        for eps in (0.1, 0.3)
    ],
    *[
        _minimal(f"cw-l2-{confidence}", "l2", "CarliniL2", {"confidence": float(confidence)},
                 tries=240, enough=205, chunk=15)
        for confidence in (0, 5, 20)
    ],
    AttackSpec(
        "autoattack-0.1", "sign", "linf", "AutoAttackCapped", {"eps": 0.1, "steps": 50, "restarts": 1, "queries": 1000},
        tries=500, enough=205, chunk=50,
    ),
    AttackSpec(
        "spatial", "spatial", "none", "SpatialTransformation",
        {"max_translation": 10, "num_translations": 3, "max_rotation": 30, "num_rotations": 9},
        tries=400, enough=205, chunk=1, apart=True,
    ),
    AttackSpec(
        "patch", "patch", "none", "AdversarialPatchLearnt",
        {"scale": 0.4, "rotation": 22.5, "rate": 0.05, "max_iter": 60, "batch": 50}, tries=400, chunk=400, apart=True,
    ),
    _minimal("elasticnet", "l1", "ElasticNet",
             {"binary_search_steps": 3, "max_iter": 40, "initial_const": 10.0, "beta": 0.01, "learning_rate": 0.05},
             tries=240, enough=205, chunk=50),
    _minimal("cw-linf", "linf", "CarliniLInf", {}, tries=240, enough=205, chunk=15),
    _query("hopskipjump", "l2", "HopSkipJump", {"norm": 2, "max_iter": 10, "max_eval": 1000, "init_eval": 100},
           tries=220, enough=205, chunk=1, stretch=_STRETCH),
    AttackSpec("pixel-20", "sparse", "l0", "PixelAttack", {"th": 20, "es": 1, "max_iter": 20},
               tries=500, enough=205, chunk=1),
)  # fmt: skip
_IMAGENET = (*_bounded({"2": 2 / 255, "4": 4 / 255, "8": 8 / 255}, tries=100, enough=80, chunk=20),)
_SUITES = {"small": _SMALL, "imagenet": _IMAGENET}
