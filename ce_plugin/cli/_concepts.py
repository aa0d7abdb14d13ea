"""``ce-plugin concepts``: train the autoencoder of a layer, and show what its concepts are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ce_plugin.cli._commands import ShowOptions, TrainOptions
from ce_plugin.cli._session import Pictures, beside, layer_name, manifest, network, say
from ce_plugin.concepts import ConceptAutoencoder, train_autoencoder
from ce_plugin.errors import FileError, expected
from ce_plugin.files import write_files
from ce_plugin.report import concept_study, save_concepts


def train(options: TrainOptions, argv: Sequence[str]) -> dict[str, str]:
    """Train an autoencoder and write it; returns the pictures that could not be read, and why."""
    out, checkpoint = options.out, Path(f"{options.out}.checkpoint")
    record_file = beside(out, force=options.force)
    _check_checkpoint(checkpoint, options)
    net = network(options)
    images = Pictures.in_folder(options.images, net, quiet=options.quiet)
    layer = layer_name(net, images[0][None], options.layer)
    say(f"Layer {layer}, {len(images)} pictures, at most {options.epochs} epochs", quiet=options.quiet)
    inputs = {"folder": str(options.images), "pictures": len(images), "unreadable": images.unreadable}
    record = manifest(options, argv, net, inputs)
    try:
        autoencoder = train_autoencoder(
            net.model,
            layer,
            images,  # type: ignore[arg-type] # whatever has a length and items serves as a Dataset
            options.concepts,
            hidden=options.hidden,
            kernel_size=options.kernel_size,
            lambda_shallow=options.lambda_shallow,
            lambda_deep=options.lambda_deep,
            lambda_interpretability=options.lambda_interpretability,
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.learning_rate,
            validation=options.held_out,
            patience=options.patience,
            checkpoint=checkpoint,
            seed=options.seed,
            show_progress=not options.quiet,
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            sys.stderr.write(f"What was trained is in {checkpoint.absolute()}; add --resume to go on from there\n")
        raise
    autoencoder.save(out, force=True)  # it is reserved
    fidelity = None if autoencoder.fidelity is None else autoencoder.fidelity.to_dict()
    findings = {"layer": layer, "fidelity": fidelity, "history": autoencoder.history}
    write_files(out.parent, {record_file.name: {**record, "findings": findings}})
    checkpoint.unlink(missing_ok=True)
    say(f"Fidelity on the held-out pictures, which chose the epoch: {autoencoder.fidelity}", quiet=options.quiet)
    say(f"Autoencoder: {out.absolute()}")
    return images.unreadable


def _check_checkpoint(checkpoint: Path, options: TrainOptions) -> None:
    """Whether the training may begin, or go on, before any work."""
    if options.resume and not checkpoint.exists():
        hint = "There is nothing to go on from: leave out --resume."
        raise FileError(
            expected("resume", f"with the file {str(checkpoint)!r} of an interrupted training", "none", hint)
        )
    if checkpoint.exists() and not options.resume:
        if not options.force:
            hint = "Go on from it with --resume, or begin again with --force."
            raise FileError(expected("out", "without an interrupted training", f"{str(checkpoint)!r}", hint))
        checkpoint.unlink()


def show(options: ShowOptions, argv: Sequence[str]) -> dict[str, str]:
    """Look at the concepts and write a page; returns the pictures that could not be read, and why."""
    autoencoder = ConceptAutoencoder.load(options.file)
    net = network(options)
    images = Pictures.in_folder(options.images, net, limit=options.limit, quiet=options.quiet)
    autoencoder.to(net.device)
    summary = f"Layer {autoencoder.layer_name}, {autoencoder.concepts} concepts, {len(images)} pictures"
    say(summary, quiet=options.quiet)
    found = concept_study(
        net,
        autoencoder,
        images,
        images.names(),
        top=options.top,
        outcome=options.outcome,
        min_fidelity=options.min_fidelity,
        show_progress=not options.quiet,
    )
    inputs = {"folder": str(options.images), "pictures": images.names(), "unreadable": images.unreadable}
    inputs |= {"file": str(options.file)}
    record = manifest(options, argv, net, inputs)
    page = save_concepts(
        found, options.out, model=net.name, outcome=options.outcome, manifest=record, tables=options.tables
    )
    say(f"{found.fidelity}\n{found.report}", quiet=options.quiet)
    say(f"Concepts: {page.absolute()}")
    return images.unreadable
