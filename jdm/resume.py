"""What a training run begins from: the last checkpoint of its work folder, another model's weights,
or nothing.

Owns the checks that a work folder is that of the run, and which items of a checkpoint hold a state.
"""

import warnings
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from jdm import checkpoint
from jdm.config import config_from_dict, differences
from jdm.data.identity import SHOWN, Identity, check_same, class_differences
from jdm.data.pipeline import TrainBatches
from jdm.errors import Failure, InvalidValue, first_ten
from jdm.hub import model_path
from jdm.joint import Joint, load
from jdm.messages import STDOUT, say
from jdm.storage import BucketError, storage_of
from jdm.training.best import Best
from jdm.training.build import Run, learning_rate
from jdm.training.step import TrainState
from jdm.training.warm import new_arrays, warm_started


def check_workdir(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises InvalidValue where the work folder holds a run with another config.

    config.json and the config in the last checkpoint are compared: either may be missing, or be
    that of another run.
    """

    def refuse(allowed: str, hint: str):
        raise InvalidValue("workdir", str(workdir), allowed, hint)

    path, stored = epath.Path(workdir) / "config.json", {}
    try:
        stored[path.name] = storage_of(path).read_json(path)
    except FileNotFoundError:
        pass
    except BucketError:
        raise
    except Failure as error:
        refuse(f"cannot be used: {error}", "move it away; checkpoints hold the config too")
    if saved := checkpoint.stored_config(workdir):
        stored[f"checkpoint {saved[0]}"] = saved[1]
    for where, values in stored.items():
        try:
            found = config_from_dict(values)
        except InvalidValue as error:
            refuse(f"cannot be used: in {where}, {error}", "choose another folder")
        if differing := differences(found, config):
            allowed = f"holds a run with another config ({'; '.join(first_ten(differing))})"
            refuse(allowed, "choose another folder, or the same values")


def check_data(workdir: epath.PathLike, step: int, dataset: Identity) -> None:
    """Raises InvalidValue where a checkpoint was trained on other data than `dataset`."""
    if "data" in checkpoint.items(workdir, step):
        before = checkpoint.read_data(workdir, step).get("dataset", {})
        check_same(before, dataset, "config.data.name", "trains")


def say_learning_rate(config: ConfigDict, workdir: epath.PathLike, step: int) -> None:
    """Says where another number of steps changes the learning rate of a run that is resumed."""
    stored = config_from_dict(checkpoint.read_config(workdir, step))
    pair = [learning_rate(**c.optim, total_steps=c.train.steps)(step) for c in (stored, config)]
    before, after = map(float, pair)
    if before != after:
        steps = f"config.train.steps: {stored.train.steps} -> {config.train.steps}"
        changed = f"the learning rate at step {step} from {before:.4g} to {after:.4g}"
        why = f"config.optim.schedule={config.optim.schedule!r} ends at the last step"
        warnings.warn(f"{steps} changes {changed}: {why}", stacklevel=2)


def best_so_far(config: ConfigDict, workdir: epath.PathLike, last: int | None) -> Best | None:
    """The record of config.checkpoint.best at the step `last`; None where it names no metric."""
    if not (metric := config.checkpoint.best):
        return None
    saved = {}
    if last is not None and "data" in checkpoint.items(workdir, last):
        saved = checkpoint.read_data(workdir, last).get("best", {})
    return Best.of(metric, config.eval.split, saved)


def warm_source(config: ConfigDict, run: Run) -> Joint | None:
    """The model at train.init_from; None for "". Raises InvalidValue where it cannot be used."""
    path = config.train.init_from
    if not path:
        return None
    found = model_path("config.train.init_from", path)
    try:
        joint = load(found)
        new_arrays(run.state.ema, joint.weights)
    except checkpoint.CheckpointError as error:
        raise InvalidValue("config.train.init_from", path, f"cannot be loaded: {error}") from error
    except InvalidValue as error:
        if error.parameter == "path":  # a repository of the hub that is not there
            raise error.about("config.train.init_from") from None
        raise InvalidValue(error.parameter, path, error.allowed) from error
    return joint


def begin(
    config: ConfigDict, run: Run, root: Any, source: Joint | None, dataset: Identity
) -> TrainState:
    """The state before the first step: new, or with the weights of `source`, see `warm_source`."""
    if source is None:
        return run.init(root)
    new, count = new_arrays(run.state.ema, source.weights), len(jax.tree.leaves(run.state.ema))
    listed = f"; new: {', '.join(first_ten(new))}" if new else ""
    restored = f"restored {count - len(new)} of {count} arrays"
    say(f"{restored} of {config.train.init_from}{listed}", STDOUT)
    if renamed := class_differences(source.dataset, dataset):
        say(f"its classes were others: {'; '.join(renamed[:SHOWN])}", STDOUT)
    return warm_started(run.init(root), source.weights)


def resume(
    run: Run, workdir: epath.PathLike, step: int, batches: TrainBatches, root: Any, other_data: bool
) -> TrainState:
    """The state of a checkpoint; also sets the position of `batches`.

    A converted checkpoint has only weights: training starts from them with a new optimiser.
    """
    if step > 0 or "train_state" in checkpoint.items(workdir, step):
        say(f"resuming from step {step} of {workdir}", STDOUT)
        items = checkpoint.restore(workdir, step, **trees_of(run.state))
        position = checkpoint.read_data(workdir, step)
        if not isinstance(position.get("next_index"), int):
            said = f"holds no position in the data: {position!r}"
            raise checkpoint.CheckpointError(f"step {step} of {workdir} {said}")
        batches.set_state(position, other_data=other_data)
        return TrainState(ema=items["weights"], **items["train_state"])
    say(f"{workdir} holds weights only: training starts from them, with a new optimiser", STDOUT)
    weights = checkpoint.restore(workdir, step, weights=run.state.ema)["weights"]
    return warm_started(run.init(root), weights)


def trees_of(state: TrainState) -> dict[str, Any]:
    """A state as items of a checkpoint: `weights`, the EMA, and `train_state`, the rest."""
    rest = {name: value for name, value in vars(state).items() if value is not None}
    return dict(weights=rest.pop("ema"), train_state=rest)
