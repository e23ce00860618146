"""What a run was trained on: the classes, the sizes of the splits, and a hash of their contents.

A checkpoint keeps this description, so that a model knows the names of its classes, and so that
other data of the same size is noticed when a run is resumed or a model evaluated. It depends on the
images and labels alone: a copy of a data set, prepared on any machine, has the same description.
"""

import hashlib
import io
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from jdm.data.lookup import dataset
from jdm.data.records import Records
from jdm.data.splits import ReadOptions, cache_folder, stored_split
from jdm.errors import InvalidValue
from jdm.files import whole_folder
from jdm.messages import STDERR

Identity = Mapping[str, Any]  # JSON: see `identity`
SHOWN = 3  # differences that an error lists


def identity(name: str, options: ReadOptions, splits: Iterable[str] = ()) -> dict[str, Any]:
    """{"name", "class_names": [K], "splits": {split: images}, "contents": {split: hash}}.

    name: see `lookup.dataset`. splits: those of the records; () is all but the large "extra" of
    SVHN. class_names: of the classes that the options select, in the order of their labels.

    Reads all records once; the hashes are kept beside the decoded images. Raises DataError and
    InvalidValue as `splits.load_split` does.
    """
    facts = dataset(name)
    stored = list(splits) or sorted({stored_split(facts, one) for one in facts.splits} - {"extra"})
    found: dict[str, Any] = {"name": name, "class_names": [], "splits": {}, "contents": {}}
    for split in stored:
        records = Records(facts, split, options.data_dir)
        names = records.class_names
        found["class_names"] = [names[k] for k in options.classes or range(len(names))]
        found["splits"][split] = len(records)
        found["contents"][split] = _contents(
            cache_folder(records, split, options, "contents"), records
        )
    return found


def identity_of_run(data: ConfigDict, options: ReadOptions) -> dict[str, Any]:
    """The identity of a run's data; with "unlabelled", that of its second data set, where it has
    one. data: the section of the config."""
    found = identity(data.name, options)
    if data.unlabelled:
        second = ReadOptions(options.data_dir, cache_dir=options.cache_dir)
        found["unlabelled"] = identity(data.unlabelled, second)
    return found


def differences(before: Identity, now: Identity) -> list[str]:
    """In words, what differs; [] where nothing does. Only what both of them know is compared."""
    found = class_differences(before, now)
    for split in before.get("splits", {}).keys() & now.get("splits", {}).keys():
        counts = [one["splits"][split] for one in (before, now)]
        if counts[0] != counts[1]:
            found.append(f"{split} had {counts[0]:,} images and has {counts[1]:,}")
        elif before["contents"][split] != now["contents"][split]:
            found.append(f"{split} has other images or labels")
    if "unlabelled" in before and "unlabelled" in now:
        second = differences(before["unlabelled"], now["unlabelled"])
        found += [f"of the unlabelled data, {one}" for one in second]
    return found


def class_differences(before: Identity, now: Identity) -> list[str]:
    """In words, the classes that have other names; [] where one of the two has no names."""
    old, new = (one.get("class_names", ()) for one in (before, now))
    if not old or not new:
        return []
    if len(old) != len(new):
        return [f"it had {len(old)} classes and has {len(new)}"]
    pairs = enumerate(zip(old, new, strict=True))
    return [f"class {k} was {a!r} and is {b!r}" for k, (a, b) in pairs if a != b]


def check_same(before: Identity, now: Identity, parameter: str, verb: str) -> None:
    """Raises InvalidValue, about the parameter, where the data differs from what it was.

    before: of a checkpoint; {} is unknown. verb: what --other-data does then: "trains"; "" where
    there is no such flag.
    """
    other = now["name"] != before.get("name", now["name"])
    found = class_differences(before, now) if other else differences(before, now)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        differs = f"is not what the model was trained on: {'; '.join(found[:SHOWN])}{more}"
        hint = f"--other-data {verb} on it anyway" if verb else ""
        raise InvalidValue(parameter, now["name"], differs, hint)


def checked_contents(
    before: Identity, name: str, options: ReadOptions, splits: Iterable[str], verb: str
) -> dict[str, str]:
    """{split of the records: hash} of those that hold these splits of a data set.

    before, verb: see `check_same`, which is about config.data.name here; {} accepts any data.
    """
    facts = dataset(name)
    now = identity(name, options, sorted({stored_split(facts, split) for split in splits}))
    check_same(before, now, "config.data.name", verb)
    return now["contents"]


def _contents(folder: Path, records: Records) -> str:
    """16 hexadecimal digits that identify the images and labels, from a file in `folder`, which is
    written first if it is missing; several processes may do so at once."""
    path = folder / "sha256.txt"
    if not folder.exists():
        digest = hashlib.sha256()
        # disable=None hides the bar where there is no terminal.
        shown = dict(desc="reading", unit=" images", file=STDERR, disable=None)
        for one in tqdm(records, total=len(records), **shown):
            image = _content(one["image"])
            digest.update(len(image).to_bytes(8, "little"))
            digest.update(image)
            digest.update(one["label"].tobytes())
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_folder(folder, f"{uuid.uuid4().hex[:8]}.part") as unfinished:
                (unfinished / path.name).write_text(digest.hexdigest()[:16])
        except OSError:
            if not folder.exists():  # otherwise another process has written the same file
                raise
    return path.read_text()


def _content(encoded: bytes) -> bytes:
    """What is hashed of an encoded image: of a grey or RGB PNG its pixels, which do not depend on
    the version of the encoder; of another file its bytes, since decoders of JPEG differ."""
    from PIL import Image

    if encoded.startswith(b"\x89PNG"):
        image = Image.open(io.BytesIO(encoded))
        if image.mode in ("L", "RGB"):
            return f"{image.mode} {image.size} ".encode() + image.tobytes()
    return encoded
