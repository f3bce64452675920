"""A defended model for a defense spec: shipped, from the cache, or trained once; or a user's own as it is."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_lite import __version__, classifiers, data, downloads, models, registry, zoo
from robustbench_lite.blackbox import Answers, BlackBox, Line, Server, Terms, is_address
from robustbench_lite.defended import Access, Defended, computing
from robustbench_lite.files import replacing
from robustbench_lite.history import History, parse, to_text
from robustbench_lite.noise import Noise
from robustbench_lite.plugins import Defense
from robustbench_lite.training import Lab, Progress
from robustbench_lite.wording import one_line

NONE = "none"  # the defense of a model that is evaluated as it is


class Untrained(ValueError):
    """A defense that does not ship, is not in the cache, and must not be trained here."""


@dataclass(frozen=True)
class Subject:
    """A defended model that is to be attacked, and what it is."""

    model: Defended
    defense: str
    architecture: str
    identity: dict[str, Any]  # all that changes its answers
    history: History = ()  # of the training of its weights

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class Inputs:
    """What a user's model expects and returns; see :class:`robustbench_lite.classifiers.Adapted`. Of a black box,
    ``access`` says what it answers, and on what terms, see :class:`robustbench_lite.blackbox.Terms`."""

    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    bounds: tuple[float, float] = (0.0, 1.0)
    probabilities: bool = False
    access: str | None = None

    @property
    def adapting(self) -> dict[str, Any]:
        """All but the access."""
        return {name: value for name, value in vars(self).items() if name != "access"}


AS_IS = Inputs()


def _silent(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Workshop:
    """Where defended models come from.

    ``model`` is an architecture's name, a reference such as ``FILE.py:factory`` or a URL, a module object, or None for
    the customary one; ``weights`` fills an architecture. With weights, a reference or an object the model is evaluated
    as it is (defense ``none``, or wrappers only).
    """

    dataset: str
    shape: tuple[int, ...]
    classes: int
    data_dir: Path | None = None
    model: str | nn.Module | None = None
    weights: Path | None = None
    inputs: Inputs = AS_IS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    note: Callable[[str], None] = _silent
    progress: Callable[[str, Progress], None] = _silent
    trains: bool = True  # or what does not ship and is not in the cache cannot be had
    threads: int = field(default_factory=torch.get_num_threads)  # that train
    fingerprint: str | None = None  # of the training split, where it is known without reading it
    asking: tuple[str, ...] = ()  # where this makes a source: what asked for it, and what asked for that

    @property
    def own(self) -> bool:
        """Whether the model is the user's, ready to be evaluated."""
        return self.weights is not None or not (self.model is None or isinstance(self.model, str)) or self._refers

    @property
    def _refers(self) -> bool:
        return isinstance(self.model, str) and classifiers.is_reference(self.model)

    @cached_property
    def terms(self) -> Terms | None:
        """Of a black box."""
        return None if self.inputs.access is None else Terms.parse(self.inputs.access)

    @property
    def access(self) -> Access:
        """What can be seen of the model."""
        if self.terms is not None:
            return self.terms.access
        return self.model.access if isinstance(self.model, Defended) else "gradients"

    @cached_property
    def _line(self) -> Line:
        """To the black box: one for all defenses, so that its terms are kept."""
        assert self.terms is not None
        if is_address(self.model):
            return Line(Server(self.architecture, self.terms.access), self.terms)
        return Line(classifiers.function(self.architecture), self.terms)

    @property
    def architecture(self) -> str:
        if isinstance(self.model, nn.Module):
            return type(self.model).__name__
        return self.model or models.customary(self.dataset, self.shape)

    def at(self, chain: str) -> tuple["Workshop", str]:
        """Where a chain is made: elsewhere than here if it names an architecture, as ``madry@cnn`` does; and the chain.

        Raises:
            ValueError: for an architecture that there is not, or where the model is the user's own.
        """
        plain, architecture = registry.split_source(chain)
        if not architecture:
            return self, chain
        if self.own:
            raise ValueError(f"defense {chain} names an architecture, but the model is given")
        models.require(architecture)
        return replace(self, model=architecture), plain

    def subject(self, chain: str) -> Subject:
        """The defended model for a chain such as ``madry:eps=0.3+feature-squeezing`` or ``wong-kolter:eps=0.1@cnn``.

        Raises:
            ValueError: for a chain that cannot be built here, or training data that is not there.
        """
        place, plain = self.at(chain)
        if place is not self:
            return place.subject(plain)
        links = self.links(chain)
        wrappers = links if self.own else links[1:]
        model = (self._guarded() if self.own else self._trained(links[0])).eval().to(self.device)
        history = model.history
        for wrapper in wrappers:
            model = wrapper(model, self._lab(wrapper)).eval().to(self.device)
        identity = {
            "defense": self.spec(links),
            "weights": weights_hash(model),
            "code": self._code(),
            "inputs": self.inputs.adapting,
            "wrappers": [_identity(wrapper) for wrapper in wrappers],
            **({} if self.terms is None else {"access": self.access, "classes": self.classes}),
        }
        return Subject(model, self.spec(links), self.architecture, identity, history)

    def source(self, spec: str, asker: str) -> Subject:
        """The defended model, frozen, for a source such as ``madry:eps=0.3@mlp``: a chain, and after an ``@`` its
        architecture, by default this workshop's own.

        Raises:
            ValueError: as :meth:`elsewhere` does, or where training data is not there.
        """
        workshop, chain = self.elsewhere(spec, asker)
        subject = workshop.subject(chain)
        subject.model.requires_grad_(False)
        return subject

    def elsewhere(self, source: str, asker: str) -> tuple["Workshop", str]:
        """Where a source that ``asker`` wants is made, and its chain.

        Raises:
            ValueError: for a chain or an architecture that there is not, and for a source that needs itself.
        """
        chain, architecture = registry.split_source(source)
        model = architecture or (None if self.own else self.model)
        made = replace(self, model=model, weights=None, inputs=AS_IS, asking=(*self.asking, asker))
        try:
            models.require(made.architecture)
            made.links(chain)
        except ValueError as error:
            raise ValueError(f"source {source} of {asker}: {error}") from error
        return made, chain

    def abroad(self) -> "Workshop":
        """The same for another process, which has nobody to tell, and need not read training data to find weights."""
        known = self.training.fingerprint if "training" in vars(self) else None
        return replace(self, note=_silent, progress=_silent, fingerprint=known)

    def name(self, chain: str) -> str:
        """A chain and its architecture in full: equal for two that are trained here only if the models are."""
        place, plain = self.at(chain)
        return f"{self.spec(place.links(plain))}@{place.architecture}"

    @staticmethod
    def spec(links: Sequence[Defense]) -> str:
        return "+".join(map(registry.spec, links)) or NONE

    def train(self, recipe: Defense, seed: int = 0) -> Defended:
        """A new model, trained by a recipe; a training of the same that was stopped goes on where it was."""
        checkpoint = self._cached(recipe, seed, "checkpoint")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        name, lab = self._called(recipe), self._lab(recipe, seed)
        lab = replace(lab, checkpoint=checkpoint, report=lambda at: self.progress(name, at))
        with computing(self.threads):
            defended = recipe(models.build(self.architecture, self.shape, self.classes, seed), lab)
        checkpoint.unlink(missing_ok=True)
        return defended

    def links(self, chain: str) -> list[Defense]:
        """The defenses of a chain, completed with what the data set implies.

        Raises:
            ValueError: unless a recipe comes first and only wrappers follow; for a user's own model only wrappers.
        """
        elsewhere, plain = self.at(chain)
        if elsewhere is not self:
            return elsewhere.links(plain)
        if not self.own and self.inputs != AS_IS:
            raise ValueError("mean, std, bounds, probabilities and access describe a model of yours; give it")
        self._check_access()
        if chain.strip() == NONE:
            if not self.own:
                raise ValueError(f"defense {NONE} needs a trained model: --model FILE.py:factory, or --weights FILE")
            return []
        if not self.own:
            models.require(self.architecture)
        links = [complete(registry.make("defense", link), self.dataset) for link in registry.split_chain(chain)]
        recipes = 0 if self.own else 1
        for place, link in enumerate(links):
            if link.trains and place >= recipes:
                why = "the model is evaluated as it is" if self.own else "only the first of a chain trains"
                raise ValueError(f"defense {link.name} trains a model, but {why}")
            if not link.trains and place < recipes:
                raise ValueError(f"defense {link.name} guards a trained model; write standard+{link.name}")
            if self._at(link) in self.asking:
                raise ValueError(f"it needs itself: {' > '.join([*self.asking, self._at(link)])}")
            for source in getattr(link, "sources", ()):
                self.elsewhere(source, self._at(link))
        return links

    def _at(self, link: Defense) -> str:
        return f"{registry.spec(link)}@{self.architecture}"

    def _called(self, recipe: Defense) -> str:
        """What a training is called where people see it."""
        return self._at(recipe) if self.asking else registry.spec(recipe)

    def _check_access(self) -> None:
        """Sees that a black box is one, and that what is asked of it can be had."""
        if isinstance(self.model, Defended) and self.access != "gradients":
            raise ValueError("a black box is named here as FILE.py:function or URL, which tells one from another later")
        if self.terms is None:
            if is_address(self.model):
                raise ValueError(f"{self.model} is a black box; say what it answers: --access labels or scores")
            return
        code = self._refers and self.architecture.partition(":")[0] not in classifiers.KINDS
        if not code or self.weights is not None:
            raise ValueError("--access is for a black box: --model FILE.py:function or a URL, without weights")
        if self.terms.access == "labels" and self.inputs.probabilities:
            raise ValueError("--probabilities is about scores; labels are none")

    def _guarded(self) -> Defended:
        """The user's model behind nothing yet."""
        own = self._own()
        if self.terms is not None:
            return BlackBox(own, self.terms.access)
        return Defended(own) if self.weights is None else self._with_history(Defended(own), self.weights)

    def _with_history(self, defended: Defended, weights: Path) -> Defended:
        """The same, with the history of its training if that came with its weights."""
        try:
            defended.history = history_of(weights)
        except ValueError as error:
            self.note(f"{weights} has a history of its training that cannot be used: {error}")
        return defended

    def _own(self) -> nn.Module:
        """The user's model, with its weights and from [0, 1] to logits."""
        if isinstance(self.model, nn.Module):
            model = self.model
        elif self.terms is not None:
            model = Answers(self._line, self.classes).eval()
        elif self._refers:
            if self.weights is None and self.architecture.startswith("timm:"):
                raise ValueError(f"{self.architecture} has no weights of its own; give --weights FILE")
            model = classifiers.load(self.architecture, self.shape, self.classes)
            usual = classifiers.customary_inputs(model)
            if usual and not (self.inputs.mean or self.inputs.std):
                self.note(f"{self.architecture} is customarily trained with {usual}; say so if yours was")
        else:
            model = models.build(self.architecture, self.shape, self.classes).eval()
        if self.weights is not None:
            fill(model, self.weights)
        if model.training:
            self.note(f"model {self.architecture} was in training mode; it is evaluated in eval mode")
        if self.inputs.adapting == AS_IS.adapting:
            return model
        return classifiers.Adapted(model, **self.inputs.adapting)

    def _code(self) -> str:
        """What stands for the user's code in a key: the hash of its file, or where it was imported from."""
        if isinstance(self.model, nn.Module):
            return f"{type(self.model).__module__}.{type(self.model).__qualname__}: {self.model}"
        return self.architecture if is_address(self.model) else classifiers.fingerprint(self.architecture)

    def _trained(self, recipe: Defense) -> Defended:
        """What ships, else what the cache holds, else newly trained and then cached."""
        wanted = registry.identity(recipe)
        for entry in zoo.manifest():
            shipped = registry.identity(registry.make("defense", entry.defense))
            if (entry.dataset, entry.model, shipped) == (self.dataset, self.architecture, wanted):
                model = models.build(entry.model, self.shape, self.classes)
                model.load_state_dict(zoo.load(entry))
                return self._with_history(Defended(model), zoo.FOLDER / entry.file)
        file = self._cached(recipe, 0, "safetensors")
        if file.exists():
            model = models.build(self.architecture, self.shape, self.classes)
            fill(model, file)
            return self._with_history(Defended(model), file)
        if not self.trains:
            raise Untrained(f"{self._called(recipe)} is trained first")
        self.note(f"{self._called(recipe)} on {self.dataset} does not ship: training it once, into {file}")
        defended = self.train(recipe)
        save(defended.model, file, history=defended.history)
        return defended

    @cached_property
    def training(self) -> data.Images:
        """The training split, read when first asked for."""
        return data.load(self.dataset, "train", self.data_dir)

    def _cached(self, recipe: Defense, seed: int, suffix: str) -> Path:
        """Where the cache keeps what a training leaves."""
        made_of = {
            "data": self.fingerprint or self.training.fingerprint,
            "model": self.architecture,
            "recipe": self._made_of(recipe),
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return downloads.cache_dir() / "trained" / f"{key}.{suffix}"

    def _made_of(self, recipe: Defense) -> dict[str, Any]:
        """The identity of a recipe, with that of its sources for what they are called."""
        identity = _identity(recipe)
        if sources := getattr(recipe, "sources", ()):
            places = [self.elsewhere(source, self._at(recipe)) for source in sources]
            identity["settings"]["sources"] = [
                [place.architecture, *map(place._made_of, place.links(chain))] for place, chain in places
            ]
        return identity

    def _lab(self, link: Defense, seed: int = 0) -> Lab:
        noise = Noise(seed, torch.zeros(1, dtype=torch.int64))
        return Lab(lambda: self.training, noise, lambda spec: self.source(spec, self._at(link)).model, self.device)


def load_defense(
    defense: str = "madry",
    dataset: str = "mnist",
    *,
    model: str | None = None,
    data_dir: str | Path | None = None,
    device: str = "cpu",
) -> Defended:
    """A defended model in eval mode, images in [0, 1] to logits: shipped, from the cache, or trained once.

    ``defense`` may name its architecture, as ``madry@mlp``.

    Raises:
        ValueError: for an unknown defense, or training data that is neither there nor to be had.
    """
    folder = None if data_dir is None else Path(data_dir)
    test = data.load(dataset, "test", folder)
    place = torch.device(device)
    workshop = Workshop(dataset, test.shape, test.classes, data_dir=folder, model=model, device=place)
    return workshop.subject(defense).model


def complete(recipe: Any, dataset: str) -> Any:
    """A recipe whose eps is None, at the data set's customary eps for its norm."""
    if getattr(recipe, "eps", 0) is None:
        return replace(recipe, eps=data.customary_eps(dataset, recipe.norm))
    return recipe


def fill(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file, or a torch state dict (arrays only, no code), into a model.

    Raises:
        ValueError: for a file that is missing, unreadable or made for another architecture.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(
            f"{path} is no safetensors file and no torch state dict: {one_line(error, named=False)[:200]}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (names and tensors)")
    try:
        model.load_state_dict(_cast(state, torch.float32))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {one_line(error, named=False)[:200]}") from error


def history_of(path: Path) -> History:
    """The history that :func:`save` wrote beside the weights of a file; empty where there is none.

    Raises:
        ValueError: for one that is malformed.
    """
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return ()
    with safe_open(path, "pt") as file:
        return parse((file.metadata() or {}).get("history", "[]"))


def save(model: nn.Module, path: Path, half: bool = False, history: History = ()) -> str:
    """Writes a model's weights as safetensors, in half precision if asked, and the history of its training, if there is
    one, as metadata; returns the file's SHA-256."""
    from safetensors.torch import save as to_bytes

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = _cast(state, torch.float16)
    content = to_bytes(state, {"version": __version__, **({"history": to_text(history)} if history else {})})
    with replacing(path) as part:
        part.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _identity(plugin: object) -> dict[str, Any]:
    return {**registry.identity(plugin), "origin": registry.origin(type(plugin))}
