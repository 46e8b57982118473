"""``dsnet classify``: photos through a network."""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..variants import list_models
from . import at_least

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import ImageError
    from ..optimized import OptimizedDSNet

NAME = "classify"
HELP = "classify photos"

DTYPES = ("float32", "bfloat16", "float16", "float64")
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0 if every image was classified; 1 if some could not be read, each told on"
        " stderr (and, with --json, under errors), the others classified all the same;"
        " 2 after any other error."
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a photo (BMP, GIF, JPEG, PNG, TIFF, WebP; the first frame, upright by its EXIF"
        " orientation, transparency on white), or a folder for all photos below it",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", metavar="FILE", help="checkpoint; it decides the variant")
    source.add_argument(
        "--random-weights", action="store_true", help="try out an untrained network, seeded"
    )
    parser.add_argument(
        "--model",
        choices=list_models(),
        help="variant (default: that of the checkpoint, dsnet_tiny with --random-weights)",
    )
    parser.add_argument(
        "--topk", type=at_least(1), metavar="K", help="predictions shown (default 5, or all)"
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="class names: text with one per line, or JSON (.json), a list or an object from index"
        " to name; without it predictions are class indices",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--size", type=at_least(32), default=224, help="of the centre crop (default 224)"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=8, help="images run at once (default 8)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 or auto (default), which is the GPU where torch sees one",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument(
        "--backend",
        type=lambda names: [name.strip() for name in names.split(",")],
        metavar="NAME[,NAME]",
        help="auto, reference, cpu, triton, cuda, or several in order of preference",
    )


def run(args: argparse.Namespace) -> int:
    import dsnet_kernels as kernels

    from ..data import ImageError

    images: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []

    def reject(error: ImageError) -> None:
        errors.append({"file": str(error.path), "error": error.reason})
        print(f"{args.prog}: {error}", file=sys.stderr)

    with kernels.backend(args.backend or kernels.current_backend()):
        model = _model(args)
        topk = args.topk or min(5, model.num_classes)
        if topk > model.num_classes:
            raise ValueError(f"--topk: expected at most {model.num_classes}, got {topk}")
        labels = read_labels(args.labels, model.num_classes) if args.labels else None
        inputs = _load(args.images, args.size, reject)
        while batch := list(itertools.islice(inputs, args.batch)):
            for file, predictions in _predict(model, batch, topk):
                if math.isnan(predictions[0]["probability"]):
                    reject(ImageError(file, "the network's output is not finite"))
                    continue
                for prediction in predictions:
                    prediction["label"] = labels[prediction["index"]] if labels else None
                images.append({"file": str(file), "predictions": predictions})
                if not args.json:
                    _print(images[-1])
    if args.json:
        print(json.dumps({"images": images, "errors": errors}, indent=2))
    return 1 if errors else 0


def read_labels(path: str, classes: int) -> list[str]:
    """Class names by index, from text with one per line, or a JSON list or object.

    Raises:
        ValueError: for a file of another form, or other than ``classes`` labels.
        OSError: for a file that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        labels = json.loads(text) if path.lower().endswith(".json") else text.rstrip().splitlines()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of labels: {error}") from error
    if isinstance(labels, dict):
        indices = [str(i) for i in range(len(labels))]
        if set(labels) != set(indices):
            raise ValueError(f"{path}: expected the keys 0 to {classes - 1}, each once")
        labels = [labels[index] for index in indices]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: expected a list of strings, or an object from index to string")
    if len(labels) != classes:
        raise ValueError(f"{path}: expected {classes} labels, one per class, got {len(labels)}")
    return labels


def _model(args: argparse.Namespace) -> "OptimizedDSNet":
    """The network that was asked for, optimised for inference."""
    import torch

    from ..devices import resolve
    from ..model import create_model
    from ..optimize import optimize

    device = resolve(args.device)
    if args.weights:
        from ..checkpoint import read_checkpoint

        checkpoint = read_checkpoint(args.weights)
        # A network of no published variant is refused by build, which names what it expected.
        name = args.model or checkpoint.variant or " or ".join(list_models())
        model = checkpoint.build(name, device=device)
        if model.num_classes == 0:
            raise ValueError(
                f"{args.weights}: expected a network with a classifier, got one without"
            )
    elif args.random_weights:
        print(f"{args.prog}: random weights: the predictions mean nothing", file=sys.stderr)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            model = create_model(args.model or list_models()[0]).to(device)
    else:
        raise ValueError(
            "expected --weights FILE: without weights the predictions would be random"
            " (--random-weights to see them all the same)"
        )
    return optimize(model, dtype=getattr(torch, args.dtype), backend=None)


def _load(
    paths: list[str], size: int, reject: "Callable[[ImageError], None]"
) -> "Iterator[tuple[Path, Tensor]]":
    """Each readable image with its tensor; the others go to ``reject``."""
    from ..data import ImageError, list_images, load_image, preprocess

    for path in paths:
        try:
            files = list_images([path])
        except ImageError as error:
            reject(error)
            continue
        for file in files:
            try:
                image = load_image(file)
            except ImageError as error:
                reject(error)
            else:
                yield file, preprocess(image, size)


def _predict(
    model: "OptimizedDSNet", batch: "list[tuple[Path, Tensor]]", topk: int
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Each file with its ``topk`` likeliest classes, the likeliest first."""
    import torch

    files, tensors = zip(*batch, strict=True)
    like = model.head.weight
    x = torch.stack(tensors).to(like.device, like.dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        probabilities, indices = model(x).float().softmax(dim=1).topk(topk, dim=1)
    for file, row, ranked in zip(files, probabilities.tolist(), indices.tolist(), strict=True):
        pairs = zip(ranked, row, strict=True)
        yield file, [{"index": index, "probability": value} for index, value in pairs]


def _print(image: dict[str, Any]) -> None:
    print(image["file"])
    for prediction in image["predictions"]:
        line = f"  {prediction['probability']:8.3%}  {prediction['index']:>4}"
        print(line if prediction["label"] is None else f"{line}  {prediction['label']}")
    sys.stdout.flush()
