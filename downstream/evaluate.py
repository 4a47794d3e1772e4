"""A fine-tuned classifier tested again: ours without its encoder's file, or a public one.

python -m downstream.finetune evaluate --finetuned runs/.../last.pt --data ROOT
python -m downstream.finetune evaluate --init mae_finetuned_vit_base.pth --data ROOT
"""

import dataclasses
from pathlib import Path

import engine  # before torch: it sets how threads wait

from downstream import encoders, finetune, recipes, transfer
from downstream.classifier import Classifier, test
from downstream.scores import match_classes
from downstream.source import open_source
from engine import UserError, require
from engine.folder import open_data
from engine.ranks import World


def open_finetuned(path: str | Path) -> Classifier:
    """The classifier of a run, without the file that its encoder came from; UserError."""
    source = open_source(path)
    if source.content["method"] != "classify":
        raise UserError(f"{path} is of method {source.content['method']}, not a fine-tuning run's")
    kept = {"train_position": False} | source.content["config"]  # before that field: fixed
    known = {f.name for f in dataclasses.fields(finetune.Config)}
    cfg = finetune.Config(**{k: v for k, v in kept.items() if k in known})
    cfg.described = source.facts["description"]
    transfer.fill(cfg, recipes.finetuning(cfg.described) | transfer.inputs(cfg))
    model, _ = finetune.build(cfg, source.facts["classes"], load=False)
    engine.load_weights(model, source.content["model"], path)
    return model


def open_public(
    init: str, root: str, image_size: int | None = None, **given
) -> tuple[Classifier, str]:
    """A public classifier of the classes of a data set, and a report; UserError.

    The norm comes after the mean of the patches (`fc_norm`), or is `norm` on the class token; the
    head must have as many rows as there are classes.

    Args: `given`: init_key, num_heads, mean, std, as on the command line.
    """
    cfg = finetune.Config(init=init, data=root, image_size=image_size, **given)
    cfg.resolve()
    classes, heads = transfer.class_names(root, trained=False), cfg.num_heads
    encoder, description, state = encoders.open_classifier(
        init, cfg.image_size, cfg.init_key, **({} if heads is None else {"num_heads": heads})
    )
    if (rows := len(state["head.weight"])) != len(classes):
        raise UserError(f"--init {init} classifies {rows} classes, {root} has {len(classes)}")
    cfg.pool = description["pool"]
    model = finetune.classifier_on(encoder, cfg, classes)
    state = {f"fc_{k}" if k.startswith("norm.") else k: v for k, v in state.items()}
    state |= {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    engine.load_weights(model, state, init)
    return model, description["report"]


def model_flags(parser: engine.Parser) -> None:
    """Flags of what tests a model: which one, and where it is computed."""
    parser.add_argument("--finetuned", help="last.pt of a fine-tuning run")
    parser.add_argument("--init", help="instead: a public classifier (MAE, ConvMAE, BEiT, timm)")
    parser.add_argument("--init-key", help="which state dict of --init's file")
    parser.add_argument("--num-heads", type=int, help="of --init, where the width does not tell")
    parser.add_argument("--image-size", type=int, help="of --init; default: its own")
    parser.add_argument("--mean", help="of --init's pixels, as 0.5,0.5,0.5; default: as trained")
    parser.add_argument("--std", help="their deviation, alike")
    parser.add_argument("--micro-batch", type=int, default=128, help="images at a time")
    parser.add_argument("--workers", type=int, help="loader processes a rank")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])


def open_model(args: object, world: World) -> Classifier:
    """The model that `model_flags` name, on its device."""
    given = {k: getattr(args, k) for k in ("init_key", "num_heads", "image_size", "mean", "std")}
    given = {k: v for k, v in given.items() if v is not None}
    if args.finetuned and given:
        flags = ", ".join(map(engine.flag, given))
        raise UserError(f"{flags}: for --init; --finetuned knows its own")
    if args.finetuned:
        model = open_finetuned(args.finetuned)
    else:
        model, words = open_public(args.init, args.data, **given)
        if world.rank == 0:
            print(words, flush=True)
    model.cfg.micro_batch, model.cfg.workers = args.micro_batch, args.workers
    require(
        (args.micro_batch > 0, "micro_batch", f"{args.micro_batch} must be above 0"),
        ((args.workers or 0) >= 0, "workers", f"{args.workers} must be 0 or above"),
    )
    return model.to(world.device).eval()


def main(argv: list[str] | None = None) -> None:
    """Test a fine-tuned model on a val split, without the encoder's own file."""
    parser = engine.Parser(
        prog="downstream.finetune evaluate", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("--data", help="whose val; default: that of the run")
    parser.add_argument("--output", help="folder of the result; default: a new one under runs/")
    model_flags(parser)
    args = parser.parse_args(argv)
    if bool(args.finetuned) == bool(args.init):
        raise UserError(
            "evaluate needs --finetuned, last.pt of a run, or --init, a public classifier"
        )
    args.data = args.data or ("data/imagenet" if args.init else None)
    world = World(args.device, args.precision)
    model = open_model(args, world)
    cfg = model.cfg
    cfg.data, cfg.output, cfg.resume = args.data or cfg.data, args.output, False
    out = Path(world.from_rank_0(lambda: engine.open_folder(cfg, "evaluate")[0]))
    dataset = open_data(cfg, world, out, "val", **finetune.loading(cfg), crop_pct=cfg.crop_pct)
    if dataset is None:
        raise UserError(f"{cfg.data} has no folder val")
    numbers = match_classes(transfer.in_classes(dataset).classes, model.classes, cfg.data)
    facts = finetune.told(cfg, args.finetuned, trained=not args.init)
    test(model, dataset, out, world, facts, numbers)
