"""The model that was loaded: its weights, precision and tokenizer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from soup.effects import Effect
from soup.effects.moe import fused_name, stored_expert
from soup.effects.quantization import QUANTIZED, plain, relative_error, tensors

FORWARDS = {  # of soup's kernels: where their forward passes are
    ("soup.kernels.norm", "_RMSNorm.forward"): "norms",
    ("soup.kernels.gate", "_GatedLinear.forward"): "gates",
    ("soup.kernels.attention", "_apart"): "documents",
    ("soup.kernels.prefixes", "_shared"): "prefixes",
    ("soup.kernels.loss", "_LinearCrossEntropy.forward"): "loss",
    ("soup.kernels.logps", "_LogProbabilities.forward"): "loss",
    ("soup.kernels.lora", "_LoraLinear.forward"): "adapters",
    ("soup.kernels.answers", "_tokens"): "passes",
}
WHOLE_BYTES = 2**31  # weights on disk up to which every element is compared, not only some rows


def weights(built: Any) -> Iterator[Effect]:
    """The tensors of the model folder against those in memory: to the bit after conversion, or, where they are
    quantized, within what quantization costs.
    """
    import torch

    model_tree = built.config.tree["model"]
    live = {plain(name): p for name, p in built.model.named_parameters() if "lora_" not in name}
    packed = {
        f"{plain(name + '.')}weight": module
        for name, module in built.model.named_modules()
        if type(module).__name__ in QUANTIZED
    }
    equal, near, different = 0, 0, []
    for name, take in tensors(built.model_folder):
        if name in packed:
            stored = take(slice(None))
            if not stored.is_floating_point():
                continue  # quantized on disk already
            error = relative_error(packed[name], stored)
            near += error < 0.2
            if error >= 0.2:  # NF4 of a normal distribution: 0.1, 8 bits: 0.01
                different.append(name)
        elif (here := live.get(fused_name(name), stored_expert(name, live))) is not None:
            rows = _rows(built.model_folder, here)
            in_memory = here.detach()[rows].cpu()
            stored = (
                take(rows).to(built.precision.weights).to(in_memory.dtype)
            )  # TRL makes some float32 again
            same_bits = in_memory.shape == stored.shape and torch.equal(in_memory, stored)
            equal += same_bits
            if not same_bits:
                different.append(name)
    ok = equal > 0 and not different
    how = f"{equal} tensors equal those of {built.model_folder.name}"
    if packed:
        how += f", {near} are quantized from them"
    if different:
        how = f"{len(different)} tensors differ: {', '.join(different[:3])}"
    yield Effect("model.base", model_tree["base"], model_tree["base"] if ok else "other weights", ok, how)
    if "revision" in model_tree:
        folder, revision = built.model_folder.name, model_tree["revision"]
        commit = revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
        ok = not commit or folder == revision
        yield Effect("model.revision", revision, folder, ok, "the folder that was loaded")
        remote = type(_base(built.model)).__module__.startswith("transformers_modules")
        asked = model_tree["trust_remote_code"]
        how = f"the model's class is {type(_base(built.model)).__module__}"
        yield Effect("model.trust_remote_code", asked, remote, asked or not remote, how)


def dtype(built: Any) -> Iterator[Effect]:
    """Element types of frozen and trained weights, and of a matrix product as the trainer computes it."""
    import torch

    precise = built.precision
    frozen = {p.dtype for p in built.model.parameters() if not p.requires_grad and p.is_floating_point()}
    trained = {p.dtype for p in built.model.parameters() if p.requires_grad}
    products = _product_dtype(built)
    wanted = precise.autocast or torch.float32
    main = frozen if built.config.lora.r is not None else trained
    quantized = built.config.model.stored != "none"
    ok = products == wanted and (quantized or main == {precise.weights})
    effective = ", ".join(sorted(map(_name, main)))
    words = ", ".join(sorted(map(_name, trained)))
    how = f"{precise.reason}; trained weights {words}; a float32 product gives {_name(products)}"
    yield Effect("model.dtype", built.config.tree["model"]["dtype"], effective, ok, how)


def tokenizer(built: Any) -> Iterator[Effect]:
    """The chat template that the saved tokenizer will carry, which is the one that rendered the rows."""
    from soup.data.encode import template_text
    from soup.data.tokenizer import TokenizerFiles

    asked = built.config.tree["model"]["chat_template"]
    carried = built.trainer.processing_class.chat_template
    own = TokenizerFiles(built.model_folder).chat_template
    wanted = own if asked is None else template_text(asked)
    effective = "none" if carried is None else "the tokenizer's own" if carried == own else "another"
    if asked is not None and carried == wanted:
        effective = asked
    how = f"the tokenizer's template of {len(carried or '')} characters"
    yield Effect("model.chat_template", asked, effective, carried == wanted, how)


def kernels(built: Any) -> Iterator[Effect]:
    """Whose forward functions the modules run, and how often soup's kernels are called for the loss of two short rows:
    as often as there are modules that they were put on."""
    from soup.kernels.fast import told as summary

    asked = built.config.backend.kernels
    owners = {owner for module in built.model.modules() if (owner := forward_owner(module))}
    asked_for = {"liger_kernel"} if built.config.training.use_liger else set()  # has a probe of its own
    if any(part.count for part in built.kernels):
        asked_for.add("soup")
    foreign = sorted(owners - {"trl", "accelerate"} - asked_for)
    told = []
    try:
        ran = calls(built)
    except Exception as error:  # noqa: BLE001, what cannot run is not in force
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        yield Effect("backend.kernels", asked, "no forward pass", False, why)
        return
    for part in built.kernels:
        told.append(str(part))
        if (seen := ran.get(part.name, 0)) != part.count:
            told[-1] += f", but {seen:g} ran"
            foreign.append(f"{part.name}: {seen:g} of {part.count}")
    effective = summary(built.kernels)
    rest = "every other module runs its library's own forward"
    how = "; ".join([*told, rest + (", or Liger's" if "liger_kernel" in asked_for else "")])
    yield Effect("backend.kernels", asked, ", ".join(foreign) or effective, not foreign, how)


def calls(built: Any) -> dict[str, float]:
    """How often a forward pass of the trainer's loss calls each of soup's kernels, as Python's profiler sees it: of two
    short rows, of answers whose reference is given, or of answers that were drawn; where the loss is the library's, of
    the model alone."""
    import torch

    from soup.effects.undisturbed import undisturbed
    from soup.kernels.fast import draws_answers, reads_answers, trains_rows

    ran: Counter[str] = Counter()
    if not any(part.count for part in built.kernels):
        return ran

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            place = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
            if place in FORWARDS:
                ran[FORWARDS[place]] += 1

    trainer = built.trainer
    first = [2, 3, 4, 5, 6]
    rows = [{"input_ids": ids, "labels": ids} for ids in (first, [3, 4, 5, 6, 7, 8, 9])]
    if reads_answers(built.config):
        sides = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")
        given = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps")
        row = {"prompt_ids": first, "label": True} | dict.fromkeys(sides, [7, 8]) | dict.fromkeys(given, 0.0)
        rows = [trainer.tokenize_row(row) if hasattr(trainer, "tokenize_row") else row]
    own_loss = any(part.name == "loss" and part.count for part in built.kernels)
    drawn = draws_answers(built.config)
    whole = trains_rows(built.config) or own_loss and not drawn
    with undisturbed(built):
        batch = trainer._prepare_inputs(trainer.data_collator(rows)) if whole else None
        ids_1T = torch.tensor([first], device=trainer.args.device)
        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            if own_loss and drawn:
                trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids_1T, torch.ones_like(ids_1T), logits_to_keep=2
                )
            elif batch is None:  # the loss is not soup's, the model's pass may be
                built.model(input_ids=ids_1T)
            else:
                trainer.compute_loss(built.model, batch)
        finally:
            sys.setprofile(before)
    passes = ran.pop("passes", 1)  # KTO's policy also says what it thinks of mismatched answers
    return {name: count / passes for name, count in ran.items()}


def forward_owner(module: Any) -> str | None:
    """The package that replaced a module's forward function, `None` where it is its class's own."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    replaced = vars(module).get("forward", owner.forward)
    while hasattr(replaced, "func"):  # a functools.partial, as accelerate's hooks are
        replaced = replaced.func
    package = (getattr(replaced, "__module__", None) or "unknown").partition(".")[0]
    own = owner.__module__.partition(".")[0]
    return None if package == own else package


def _product_dtype(built: Any) -> Any:
    """Element type of a product of float32 matrices inside the trainer's autocast."""
    import torch

    matrix = torch.ones(2, 2, device=built.trainer.args.device)
    with torch.no_grad(), built.trainer.accelerator.autocast():
        return (matrix @ matrix).dtype


def _rows(folder: Any, tensor: Any) -> slice:
    """Rows to compare: all, or the first ones where that would read many GiB."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return slice(None) if total <= WHOLE_BYTES or tensor.dim() < 2 else slice(0, 64)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
