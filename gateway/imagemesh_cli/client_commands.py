"""The commands that ask a gateway."""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from imagemesh_cli.console import complain, connected, counted, print_json, print_table, progress_bar
from imagemesh_client import (
    Choice,
    Classify,
    Control,
    ControlSavings,
    Embed,
    GeneratedImage,
    GenerateOptions,
    Generation,
    Hires,
    Keep,
    Model,
    Reference,
)
from imagemesh_runtime.errors import InvalidArgument
from imagemesh_runtime.findings import A_MODEL


def generate(args: Namespace) -> int:
    """Make pictures of a prompt and write them to files."""
    options = generation_options(args)
    with connected(args) as client, progress_bar("generating") as show:
        generation = client.generate(args.prompt, **options, on_progress=show)
    tell_generation(generation, save(generation, args.output), args.json)
    return 0 if generation.images else 1


def save(generation: Generation, output: Path) -> list[Path]:
    """Write the pictures, and beside them their vectors if there are any; the answer is where the pictures are."""
    paths = numbered(output, len(generation.images))
    for image, path in zip(generation.images, paths, strict=True):
        image.save(path)
        if image.embedding is not None:
            np.save(path.with_suffix(".npy"), image.embedding)
    return paths


def tell_generation(generation: Generation, files: list[Path], as_json: bool) -> None:
    """What was made, and where it is."""
    if as_json:
        print_json(_generation_json(generation, files))
    else:
        _print_generation(generation, files)


def generation_options(args: Namespace) -> GenerateOptions:
    """The options of a generation that the command was given; an error names one that lacks what it belongs to."""
    _check_mask(args)
    classify, embed, keep = _looks(args)
    return GenerateOptions(
        negative_prompt=args.negative,
        model=args.model,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        width=args.size[0] if args.size else None,
        height=args.size[1] if args.size else None,
        scheduler=args.scheduler,
        scheduler_options=dict(args.scheduler_option),
        guider=args.guider,
        guider_options=dict(args.guider_option),
        n=args.n,
        clip_skip=args.clip_skip,
        literal_prompt=args.literal_prompt,
        controls=_controls(args),
        references=_references(args),
        control_savings=_savings(args),
        image=args.image,
        strength=args.strength,
        mask=args.mask,
        invert_mask=args.invert_mask,
        mask_blur=args.mask_blur,
        keep_unmasked=args.keep_unmasked,
        mask_padding=args.mask_padding,
        hires=_hires(args),
        classify=classify,
        embed=embed,
        keep=keep,
        priority=args.priority,
        variation_strength=args.variation_strength,
        variation_seed=args.variation_seed,
    )


# Ends of options that go with a --control, and the SDK's names for them.
_OF_A_CONTROL = {
    "model": "model",
    "scale": "scale",
    "start": "start",
    "end": "end",
    "blocks": "block_weights",
    "preprocessor": "preprocessor",
    "type": "control_type",
}


def _check_mask(args: Namespace) -> None:
    if args.mask is not None:
        return
    for name in ("mask_blur", "mask_padding", "invert_mask", "keep_unmasked"):
        if given := getattr(args, name):
            raise InvalidArgument(f"--{name.replace('_', '-')}", given, "given beside --mask")


def _each(args: Namespace, what: str, names: Iterable[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The n-th --WHAT with the n-th of each option for it, by the ends of their names."""
    files = getattr(args, what)
    options = {name: getattr(args, f"{what}_{name}") for name in names}
    for name, values in options.items():
        if len(values) > len(files):
            allowed = f"given at most once for each --{what} ({len(files)})"
            raise InvalidArgument(f"--{what}-{name}", counted(len(values), "time"), allowed)
    for file, *row in zip_longest(files, *options.values()):
        yield file, {name: one for name, one in zip(options, row, strict=True) if one is not None}


def _savings(args: Namespace) -> ControlSavings | None:
    savings = ControlSavings(args.control_reuse, args.control_conditional_only, args.control_rounding)
    return None if savings == ControlSavings() else savings


def _references(args: Namespace) -> list[Reference]:
    return [Reference(file, **given) for file, given in _each(args, "reference", ("adapter", "scale"))]


def _controls(args: Namespace) -> list[Control]:
    if args.guess_mode and not args.control:
        raise InvalidArgument("--guess-mode", True, "given beside --control")
    controls = []
    for file, found in _each(args, "control", _OF_A_CONTROL):
        given = {_OF_A_CONTROL[name]: one for name, one in found.items()}
        if "preprocessor" in given:
            given["preprocessor"], given["parameters"] = given["preprocessor"]
        controls.append(Control(file, guess_mode=args.guess_mode, **given))
    return controls


def _hires(args: Namespace) -> Hires | None:
    if args.hires is None:
        for name in ("upscaler", "steps", "strength"):
            if given := getattr(args, f"hires_{name}"):
                raise InvalidArgument(f"--hires-{name}", given, "given beside --hires")
        return None
    scale, size = (None, args.hires) if isinstance(args.hires, tuple) else (args.hires, None)
    return Hires(scale, size, args.hires_upscaler, args.hires_steps, args.hires_strength)


def _looks(args: Namespace) -> tuple[Classify | None, Embed | None, Keep | None]:
    if args.keep is None:
        for name, usual in (("keep_among", 1), ("keep_probability", 0.0), ("retries", 0)):
            if (given := getattr(args, name)) != usual:
                raise InvalidArgument(f"--{name.replace('_', '-')}", given, "given beside --keep")
    if args.embed_model and not args.embed:
        raise InvalidArgument("--embed-model", args.embed_model, "given beside --embed")
    if args.classify_model and args.classify is None and args.keep is None:
        raise InvalidArgument("--classify-model", args.classify_model, "given beside --classify or --keep")
    seen = args.classify is not None or args.classify_model
    classify = Classify(args.classify or 5, args.classify_model) if seen else None
    embed = Embed(model=args.embed_model) if args.embed else None
    if args.keep is None:
        return classify, embed, None
    return classify, embed, Keep(args.keep, args.keep_among, args.keep_probability, args.retries)


def numbered(output: Path, count: int) -> list[Path]:
    """FILE itself, or FILE-0, FILE-1... before its suffix."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def _generation_json(generation: Generation, files: list[Path]) -> object:
    images = [
        {"file": str(path), "seed": image.seed} | _seen_json(image)
        for image, path in zip(generation.images, files, strict=True)
    ]
    parameters, timings = asdict(generation.parameters), [asdict(timing) for timing in generation.timings]
    rejected = [asdict(one) for one in generation.rejected]
    told = {"id": generation.id, "images": images, "parameters": parameters, "timings": timings}
    return told | ({"rejected": rejected} if rejected else {})


def _seen_json(image: GeneratedImage) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if image.classification is not None:
        told["classification"] = [asdict(one) for one in image.classification.predictions]
    if image.embedding is not None:
        told["embedding"] = image.embedding.tolist()
    return told


def _print_generation(generation: Generation, files: list[Path]) -> None:
    made = generation.parameters
    for image, path in zip(generation.images, files, strict=True):
        print(
            f"{path}: seed {image.seed}, {made.width}x{made.height}, {counted(made.steps, 'step')}, "
            f"guidance {made.guidance:g}, {made.scheduler}, {made.model}"
        )
        for one in image.classification.predictions if image.classification else ():
            print(f"{path}: {one.label} {one.probability:.1%}")
    for rejected in generation.rejected:
        complain(f"picture {rejected.index} with seed {rejected.seed} is not kept: {rejected.reason}")


def models(args: Namespace) -> int:
    """List what the mesh can run."""
    with connected(args) as client:
        answer = client.models()
    if args.json:
        told = {"unreachable": answer.unreachable, "roots": answer.roots}
        print_json({"models": [asdict(model) for model in answer], **told})
        return 0
    rows = [
        (
            model.name,
            model.role,
            model.backend,
            model.dtype,
            model.device,
            "yes" if model.loaded else "no",
            _own_scheduler(model),
        )
        for model in answer
    ]
    if rows:
        print_table(("MODEL", "ROLE", "BACKEND", "DTYPE", "DEVICE", "LOADED", "SCHEDULER"), rows)
    elif answer.roots:
        complain(f"no model: the services looked in {', '.join(answer.roots)}; {A_MODEL}")
    if answer.unreachable:
        complain(f"not reachable: {', '.join(answer.unreachable)}; their models are missing from the list")
    return 0


def _own_scheduler(model: Model) -> str:
    """By the name that ``--scheduler`` takes, and its class where that is another."""
    name, class_name = (model.properties.get(key, "") for key in ("scheduler", "scheduler_class"))
    return name if class_name in ("", name) else f"{name} ({class_name})"


def schedulers(args: Namespace) -> int:
    """List the schedulers that a generation can have."""
    with connected(args) as client:
        _tell_choices(client.sampling().schedulers, args.json)
    return 0


def guiders(args: Namespace) -> int:
    """List the ways of guidance that a generation can have."""
    with connected(args) as client:
        _tell_choices(client.sampling().guiders, args.json)
    return 0


def _tell_choices(choices: Sequence[Choice], as_json: bool) -> None:
    if as_json:
        print_json([asdict(choice) for choice in choices])
        return
    rows = [
        (one.name, one.class_name, one.about or ", ".join(f"{name}={value}" for name, value in one.options.items()))
        for one in choices
    ]
    print_table(("NAME", "CLASS", "WHAT IT IS"), rows)
