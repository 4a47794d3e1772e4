"""The papers' claims as runs: arms that differ in one switch, and what is measured of them.

A sentence is ours, after the paper's table or figure; docs/ablations.md has the paper's own rows as
commands. tools/claims.py runs these with `--model tiny`.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Rates of fine-tuning that are tried on the first seed; an arm keeps its best (claims.py).
TUNED = ("--base-lr 8e-3 --layer-decay 0.75", "--base-lr 4e-3 --layer-decay 0.9")
FRESH = ("--base-lr 4e-3 --layer-decay 1", "--base-lr 8e-3 --layer-decay 1")


class Arm(NamedTuple):
    """One side of a comparison.

    Args:
        train: script and the flags in which the arm differs; budget, data and seed come on top.
        share: of the claim's epochs of pre-training.
        as_long_as: an arm whose whole cost sets this one's epochs: of pre-training, or, with
            `random`, of training on labels.
        random: fresh weights in the architecture that `train` makes.
        tries: flags of fine-tuning, see above.
    """

    train: str
    share: float = 1.0
    as_long_as: str = ""
    random: bool = False
    tries: Sequence[str] = TUNED[:1]

    @property
    def encoder(self) -> str:
        """What transfer costs by: the script, and those flags here that change an encoder."""
        script, *flags = self.train.split()
        shape = "--dims", "--proxies", "--patch-size"
        pairs = [f"{k} {v}" for k, v in zip(flags, flags[1:]) if k in shape]
        return " ".join([script, *pairs])

    def part(self, epochs: int) -> int:
        """Its share of a claim's epochs, whole ones."""
        return max(1, round(epochs * self.share))


class Claim(NamedTuple):
    """What a paper says, and the runs that would show it.

    Args:
        source: paper, table or figure.
        arms: by label. better: pairs of labels, first the one that should win.
        measures: keys of claims_report.MEASURES.
        unlike: pairs whose losses do not compare: one has other patches to predict, or sees them.
        data: a key of DATA.
        epochs, tuned: of pre-training and fine-tuning, where the command line gives no others.
    """

    source: str
    sentence: str
    arms: dict[str, Arm]
    better: Sequence[tuple[str, str]]
    measures: Sequence[str]
    data: str = "images"
    epochs: int = 20
    tuned: int = 10
    unlike: Sequence[tuple[str, str]] = ()


DATA = {  # name: (default place, what it is)
    "images": ("data/tiny_imagenet_40", "40 classes of Tiny ImageNet"),
    "regions": ("data/tiny_imagenet_40_regions", "40 classes of Tiny ImageNet with region maps"),
    "shapes": ("shapes", "ShapeScenes"),
}


def arms(script: str, **flags: str) -> dict[str, Arm]:
    """Arms of one script: {label: its flags}, `_` in a keyword being a space."""
    return {k.replace("_", " "): Arm(f"{script} {v}".strip()) for k, v in flags.items()}


def against(winners: str | Sequence[str], losers: Sequence[str]) -> list[tuple[str, str]]:
    winners = [winners] if isinstance(winners, str) else winners
    return [(w, x) for w in winners for x in losers]


def scratch(script: str, data: str = "images") -> Claim:
    """Pre-training and fine-tuning beats training on labels alone for as long."""
    pair = {"pre-trained": Arm(script, tries=TUNED)}
    pair["from scratch"] = Arm(script, as_long_as="pre-trained", random=True, tries=FRESH)
    return Claim(
        "all", "pre-training beats training from scratch for as long", pair,
        [("pre-trained", "from scratch")], ("finetuned",), data,
    )  # fmt: skip


MODALITIES = Claim(
    "CFMAE Table 6e", "three granularities beat RGB alone",
    arms("cfmae --masking RD --granularities", **{"R+I+S": "R+I+S", "R+S": "R+S", "R+I": "R+I",
                                                  "R": "R"}),
    against(["R+I+S", "R+S", "R+I"], ["R"]), ("linear", "finetuned"), "regions",
)  # fmt: skip
CASCADE = Claim(
    "CFMAE Tables 5, 6d", "the cascade beats a parallel decoder",
    arms("cfmae", cascaded="", parallel="--decoder parallel", R_first="--order R-I-S",
         no_cross_attention="--decoder no-cross-attention"),
    against("cascaded", ["parallel", "no cross attention", "R first"]),
    ("linear", "finetuned"), "regions",
)  # fmt: skip
CURRICULUM = Claim(
    "CFMAE Tables 6b, 6c", "the curriculum beats any one kind of mask, and its reverse",
    arms("cfmae", switch="", smooth="--mix sample",
         RD="--masking RD --granularities R+I+S",  # MODALITIES' words, so that they share the run
         IG="--masking IG", SG="--masking SG", reversed="--masking RD-IG-SG"),
    against(["switch", "smooth"], ["RD", "IG", "SG", "reversed"]),
    ("linear", "finetuned"), "regions",
)  # fmt: skip
BEYOND_MAE = Claim(
    "CFMAE Table 1", "CFMAE beats MAE at equal epochs",
    {"cfmae": Arm("cfmae"), "mae": Arm("mae"), "mae, as long": Arm("mae", as_long_as="cfmae")},
    against("cfmae", ["mae", "mae, as long"]), ("linear", "finetuned"), "regions",
)  # fmt: skip


def on_shapes(claim: Claim) -> Claim:
    """The same on ShapeScenes, whose maps are true; what it teaches is tested by segmentation."""
    return claim._replace(data="shapes", measures=("segmentation",), epochs=4)


CLAIMS = {
    "scratch-mae": scratch("mae"),
    "scratch-cfmae": scratch("cfmae --granularities R"),
    "scratch-cfmae-regions": scratch("cfmae", "regions"),
    "scratch-semanticmim": scratch("semanticmim"),
    "scratch-semanticmim-8": scratch("semanticmim --patch-size 8"),  # its probe is the better one
    "scratch-mcmae": scratch("mcmae"),
    "scratch-coma_dyvit": scratch("coma_dyvit --evaluation none"),
    "cfmae-modalities": MODALITIES,
    "cfmae-modalities-shapes": on_shapes(MODALITIES),
    "cfmae-cascade": CASCADE,
    "cfmae-cascade-shapes": on_shapes(CASCADE),
    "cfmae-curriculum": CURRICULUM,
    "cfmae-curriculum-shapes": on_shapes(CURRICULUM),
    "cfmae-mae": BEYOND_MAE,
    "cfmae-mae-shapes": on_shapes(BEYOND_MAE),
    "semanticmim-proxies": Claim(
        "SemanticMIM Table 1, Fig. 5", "proxies help, the probe most",
        arms("semanticmim --patch-size 8 --proxies", **{f"{n}": f"{n}" for n in (0, 1, 4, 8, 16)}),
        against(["1", "4", "8", "16"], ["0"]),
        ("linear CLS", "linear patch", "knn", "finetuned"),
    ),
    "mcmae-parts": Claim(
        "MCMAE Tables 5, 6", "block-wise masks, masked convolution, multi-scale decoder help",
        arms("mcmae", multi_scale="", block="--no-multi-scale",
             token="--no-multi-scale --masking token",
             unmasked="--no-multi-scale --no-masked-conv"),
        [("block", "token"), ("block", "unmasked"), ("multi scale", "block")],
        ("linear", "finetuned", "loss"),
        unlike=[("block", "token"), ("block", "unmasked")],
    ),
    "mcmae-mae": Claim(
        # The figure's epochs are of fine-tuning, after 1600 of pre-training; these of pre-training.
        "MCMAE Sec. 3.5", "MCMAE learns faster than MAE, here by epochs of pre-training",
        {f"{m}, 1/{n}" if n > 1 else m: Arm(m, share=1 / n) for n in (8, 4, 2, 1)
         for m in ("mcmae", "mae")},
        [(f"mcmae{x}", f"mae{x}") for x in (", 1/8", ", 1/4", ", 1/2", "")], ("finetuned",),
        epochs=40,
    ),
    "coma-masks": Claim(
        "CoMA Table 2", "complementary masks beat a random one",
        arms("coma_dyvit --evaluation", none="none", common="common", shared="shared")
        | {"none, as long": Arm("coma_dyvit --evaluation none", as_long_as="shared")},
        [("common", "none"), ("shared", "none"), ("shared", "none, as long")],
        ("linear", "finetuned"),
    ),
    "dyvit-vit": Claim(
        "DyViT Table 2", "DyViT beats ViT at as many parameters",
        {"dyvit": Arm("coma_dyvit --evaluation none --dims 24-48-96-192"),
         "vit": Arm("mae --mask-ratio 0.6"),
         "dyvit, scratch": Arm("coma_dyvit --evaluation none --dims 24-48-96-192", random=True,
                               tries=FRESH),
         "vit, scratch": Arm("mae --mask-ratio 0.6", random=True, tries=FRESH)},
        [("dyvit", "vit"), ("dyvit, scratch", "vit, scratch")], ("finetuned",),
    ),
}  # fmt: skip
