"""Published image tokenizers -> tokenizer folders: the VQ-GANs of taming-transformers and the IBQ
tokenizers of SEED-Voken (Open-MAGVIT2).

Both are released as a Lightning checkpoint with a YAML. Their encoders and decoders have the same
architecture and parameter names; IBQ chooses codes by the dot product, and its results are those of
the running averages of its weights, which lie in the checkpoint beside the weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from icl_moe.errors import InputError
from icl_moe.outputs import output_folder, writing
from icl_moe.settings import from_dict
from icl_moe.tokenizers.folder import check_file, check_free, load_torch_weights
from icl_moe.tokenizers.vqgan import VQGAN, Lookup, VQGANConfig


def convert_release(checkpoint: Path, config_yaml: Path, out: Path) -> VQGAN:
    """Convert a release (a Lightning checkpoint and its YAML) to a tokenizer folder `out`.

    The loss and the discriminator in the checkpoint are left out. If an IBQ config has `use_ema`,
    the averaged weights are taken, otherwise, and for VQ-GANs, those of the last step. Raises
    InputError for a checkpoint that is damaged or holds anything but tensors and plain values, for
    keys that do not fit the YAML, for another network architecture, and if `out` holds anything
    else.
    """
    out, checkpoint, config_yaml = output_folder(out), Path(checkpoint), Path(config_yaml)
    config, averaged = _read_config(config_yaml)
    state = load_torch_weights(checkpoint, "The checkpoint")
    weights = {
        key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))
    }
    if averaged:
        weights = _averages(weights, state, checkpoint, config_yaml)
    model = VQGAN.from_weights(config, weights, origin=str(checkpoint))
    check_free(out, model.fingerprint)
    with writing(out):
        model.save_pretrained(out)
    return model


def _averages(
    weights: Mapping[str, Tensor], state: Mapping[str, Tensor], checkpoint: Path, config: Path
) -> dict[str, Tensor]:
    """The running averages of weights. A checkpoint has them under the weights' names without dots,
    after `model_ema.`.
    """
    names = {key: "model_ema." + key.replace(".", "") for key in weights}
    missing = [name for name in names.values() if name not in state]
    if missing:
        raise InputError(
            f"{checkpoint} lacks the averaged weights ({missing[0]}, for example) that {config} "
            "announces with use_ema; with use_ema: false the weights of the last step are taken."
        )
    return {key: state[name] for key, name in names.items()}


# --- The published YAML ---


@dataclass(frozen=True)
class _Keys:
    """The keys of a section. names: key -> name in `VQGANConfig`. fixed: other keys, which must
    have this value, since another value would mean another network. idle: keys that affect only
    training, or the layout of codes in a tensor.
    """

    names: Mapping[str, str]
    fixed: Mapping[str, Any]
    idle: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """How the releases of one project are configured.

    title: in messages. section: the keys of the model's settings, one within the other. keys: of
    that section. lookup: how its codes are chosen.
    """

    title: str
    section: tuple[str, str]
    keys: _Keys
    lookup: Lookup


_CODEBOOK = {"n_embed": "codebook_size", "embed_dim": "code_channels"}
_IDLE = (
    "ddconfig",
    "lossconfig",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "monitor",
    "sane_index_shape",
    "learning_rate",
    "use_ema",
)
_TAMING = _Kind(
    "a taming-transformers VQModel",
    ("model", "params"),
    _Keys(
        names=_CODEBOOK,
        fixed={"remap": None},
        idle=(*_IDLE, "scheduler_config", "lr_g_factor", "batch_resize_range"),
    ),
    "distance",
)
_IBQ = _Kind(
    "an IBQ tokenizer of SEED-Voken",
    ("model", "init_args"),
    _Keys(
        names=_CODEBOOK,
        fixed={"remap": None, "cosine_similarity": False},
        idle=(
            *_IDLE,
            "l2_normalize",  # of a quantizer that IBQ replaces
            "use_entropy_loss",
            "sample_minimization_weight",
            "batch_maximization_weight",
            "entropy_temperature",
            "beta",
            "stage",
            "gradient_clip_val",
            "warmup_epochs",
            "scheduler_type",
            "min_learning_rate",
            "resume_lr",
            "lr_drop_epoch",
            "lr_drop_iter",
            "lr_drop_rate",
            "use_shared_epoch",
            "sche_type",
            "wp",
            "wp0",
            "wpe",
            "wp_iter",
            "max_iter",
        ),
    ),
    "dot_product",
)
_NETWORK = _Keys(
    names={
        "resolution": "image_size",
        "z_channels": "latent_channels",
        "ch": "channels",
        "ch_mult": "channel_multipliers",
        "num_res_blocks": "blocks_per_level",
        "attn_resolutions": "attention_sizes",
    },
    fixed={
        "in_channels": 3,
        "out_ch": 3,
        "double_z": False,
        "tanh_out": False,
        "give_pre_end": False,
        "resamp_with_conv": True,
        "use_timestep": False,
        "use_linear_attn": False,
        "attn_type": "vanilla",
    },
    idle=("dropout",),
)


def _read_config(path: Path) -> tuple[VQGANConfig, bool]:
    """The network, and whether its averaged weights are to be taken."""
    check_file(path, "The config")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The config {path} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML.") from error
    kind = _kind(path, content)
    where = ".".join(kind.section)
    params = _section(path, kind, content, kind.section)
    network = _section(path, kind, params, ("ddconfig",), f"{where}.")
    values = {
        **_values(path, kind, where, params, kind.keys),
        **_values(path, kind, f"{where}.ddconfig", network, _NETWORK),
        "lookup": kind.lookup,
    }
    config = from_dict(VQGANConfig, values, origin=str(path))
    return config, kind is _IBQ and bool(params.get("use_ema", False))


def _kind(path: Path, content: object) -> _Kind:
    """The kind of release, by the class that the YAML names in Lightning's layout."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or "class_path" not in model:
        return _TAMING
    if str(model["class_path"]).rpartition(".")[2] != "IBQ":
        raise InputError(
            f"{path} is the config of {model['class_path']}; only taming-transformers' VQModel and "
            "SEED-Voken's IBQ tokenizers can be converted."
        )
    return _IBQ


def _values(
    path: Path, kind: _Kind, where: str, section: Mapping[str, object], keys: _Keys
) -> dict[str, object]:
    """The settings of `VQGANConfig` that a section has; where: its name."""
    for theirs in keys.names:
        if theirs not in section:
            raise InputError(f"{path} is not a config of {kind.title}: {where} lacks '{theirs}'.")
    for key, value in section.items():
        if key in keys.fixed and value != keys.fixed[key]:
            raise InputError(
                f"{path}: only networks with {where}.{key}: {json.dumps(keys.fixed[key])} are "
                f"supported, not {value!r}."
            )
        if not any(key in known for known in (keys.names, keys.fixed, keys.idle)):
            raise InputError(
                f"{path}: the key {where}.{key} is unknown; remove it if it does not change the "
                "network."
            )
    return {ours: section[theirs] for theirs, ours in keys.names.items()}


def _section(
    path: Path, kind: _Kind, values: object, keys: tuple[str, ...], prefix: str = ""
) -> dict[str, object]:
    """The mapping that lies within `values` under one key after the other."""
    for key in keys:
        inner = values.get(key) if isinstance(values, dict) else None
        if not isinstance(inner, dict):
            raise InputError(
                f"{path} is not a config of {kind.title}: it lacks the section {prefix}{key}."
            )
        values, prefix = inner, f"{prefix}{key}."
    assert isinstance(values, dict)
    return values
