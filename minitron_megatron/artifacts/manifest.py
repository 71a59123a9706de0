"""The manifest: what an output folder is, what it was made from, and whether it is complete.

`manifest.json` is the last file that a verb writes. A folder without it is not a result.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from minitron_megatron import __version__
from minitron_megatron.artifacts.fingerprint import fingerprint, is_of
from minitron_megatron.config.changes import content, defaults, differences
from minitron_megatron.config.reader import show
from minitron_megatron.config.schema import SCHEMAS
from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import read_json, write_json

MANIFEST = "manifest.json"
# The results of an evaluation, beside its manifest, and the number of every question of its tasks.
EVALUATION, QUESTIONS = "evaluation.json", "questions.json"
# Kind of a folder with a teacher's predictions, which may stand where a checkpoint of the teacher does.
CACHE = "cache"
# The tokenizer and other files of the Hugging Face model, in a folder of their own.
HUGGINGFACE = "huggingface"


@dataclass
class Parent:
    """One input of a verb.

    Attributes:
        role: its role, such as `teacher`.
        path: where it was.
        fingerprint: of its content, see `fingerprint`.
    """

    role: str
    path: str
    fingerprint: str

    @classmethod
    def of(cls, role: str, path: Path) -> "Parent":
        return cls(role, str(path), fingerprint(path))

    def matches(self, recorded: str) -> bool:
        """Returns whether a fingerprint, which an earlier version may have recorded, is that of what is at `path`."""
        return recorded == self.fingerprint or is_of(recorded, Path(self.path))


@dataclass
class Manifest:
    """What a folder is.

    Attributes:
        kind: `checkpoint`, `scores`, `evaluation`, `huggingface`, `cache` or `run`.
        network: `Network.to_dict()`, where there is one.
        parents: the inputs.
        config: the resolved settings.
        details: anything else worth knowing (counts, seconds, notes).
        version: of this package.
        verb: that made the folder; None in files of versions that did not write it.
    """

    kind: str
    network: dict | None = None
    parents: list[Parent] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    version: str = __version__
    verb: str | None = None

    def write(self, folder: Path) -> None:
        """Writes `manifest.json` into `folder` atomically."""
        write_json(folder / MANIFEST, asdict(self))

    def parent(self, role: str) -> Parent | None:
        """Returns the input with a role, if there is one."""
        return next((parent for parent in self.parents if parent.role == role), None)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads a folder's manifest.

        Raises:
            CheckpointError: there is none, or it is not a valid one.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a finished result")
        values = read_json(path, "a manifest")
        try:
            return cls.from_dict(values)
        except TypeError as e:
            raise CheckpointError(f"{path} is not a manifest: {e}") from e

    @classmethod
    def from_dict(cls, values: dict) -> "Manifest":
        """Makes a manifest from the content of its file.

        Raises:
            TypeError: a field is unknown, or its value is of the wrong type.
        """
        former = {"network": values["shape"]} if "shape" in values else {}  # its name in earlier versions
        given = {name: value for name, value in values.items() if name != "shape"}
        manifest = cls(**{**given, **former, "parents": [Parent(**parent) for parent in values.get("parents", [])]})
        kinds = {
            "kind": str,
            "network": dict | None,
            "config": dict,
            "details": dict,
            "version": str,
            "verb": str | None,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(manifest, name), kind):
                raise TypeError(f"{name} = {show(getattr(manifest, name))}")
        return manifest

    @classmethod
    def is_of_kind(cls, kind: str, folder: Path) -> bool:
        """Returns whether a folder has a manifest, which says that it is of a kind."""
        return (folder / MANIFEST).is_file() and cls.read(folder).kind == kind

    @property
    def cache_key(self) -> tuple[str, dict[str, str], dict[str, object]]:
        """All that the result depends on: kind, fingerprints of the inputs by role, and settings.

        Settings that the verb's settings class marks as `SAME_RESULT` are left out.
        """
        parents = {parent.role: parent.fingerprint for parent in self.parents}
        # Inputs count by their content, so that moving a file or folder changes nothing.
        values = content(SCHEMAS.get(self.verb or ""), self.config)
        settings = {name: self._by_role(value) for name, value in values.items() if name not in parents}
        return self.kind, parents, settings

    def _by_role(self, value: object) -> object:
        """Returns a list of paths with the roles of those that are inputs."""
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return value
        roles = {parent.path: parent.role for parent in self.parents}
        # Token files are named by their prefix.
        return [roles.get(str(Path(item))) or roles.get(f"{item}.bin", item) for item in value]

    def changes(self, later: "Manifest") -> list[str]:
        """Returns what differs in the manifest of a later run, a phrase for each; empty if its result is the same."""
        # Manifests of earlier versions name no verb; they are taken to be of the later run's.
        before = self if self.verb else replace(self, verb=later.verb)
        (kind, parents, settings), (new_kind, new_parents, new_settings) = before.cache_key, later.cache_key
        kinds = [] if kind == new_kind else [f"it was a {kind} and is to be a {new_kind}"]
        same = {parent.role for parent in later.parents if parent.matches(parents.get(parent.role, ""))}
        inputs = [f"{role} is another one" for role in {**parents, **new_parents} if role not in same]
        came_later = dict(defaults(SCHEMAS[later.verb])) if later.verb in SCHEMAS else {}
        values = differences({**came_later, **settings}, {**came_later, **new_settings})
        return [*kinds, *inputs, *(f"{key} was {show(old)} and is {show(new)}" for key, old, new in values)]
