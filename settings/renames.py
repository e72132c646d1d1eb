"""Names that settings and parameters had before, for everything that was written under them.

The first name of a setting or parameter stays its identity: `ml_hash` and `system_hash` are taken over the
first names of settings, and the generator of an initial value is keyed by the first name of its parameter. So
a rename changes no hash and no initial value. Committed logs, claims, attempts and checkpoints are read under
the present names; on the command line a former name is refused with the present one (schema.find_field).

To rename a setting: rename its field, and add a line here. A former name must not be used again for anything
else, and a setting stays in its section.
"""

import re
from typing import Any

from common.errors import UserError

SETTINGS = {  # former path -> present path, of a setting or a section
    "model.attn.documents": "model.attn.document_mask",
    "model.attn.rope.half": "model.attn.rope.half_truncated",
    "model.attn.latent.kv": "model.attn.latent.kv_lora_rank",
    "model.attn.latent.query": "model.attn.latent.q_lora_rank",
    "model.attn.latent.still": "model.attn.latent.qk_nope_head_dim",
    "model.attn.latent.turning": "model.attn.latent.qk_rope_head_dim",
    "model.attn.latent.value": "model.attn.latent.v_head_dim",
    "model.mlp.moe.experts": "model.mlp.moe.num_experts",
    "model.mlp.moe.score": "model.mlp.moe.score_func",
    "model.mlp.moe.normalise": "model.mlp.moe.route_norm",
    "model.mlp.moe.gate_scale": "model.mlp.moe.route_scale",
    "model.mlp.moe.groups": "model.mlp.moe.num_expert_groups",
    "model.mlp.moe.groups_kept": "model.mlp.moe.num_limited_groups",
    "model.mlp.moe.sequence_loss": "model.mlp.moe.seq_aux_loss",
    "model.head.train_loss": "model.head.loss_reduction",
    "optim.mlp_up": "optim.c_fc",
    "optim.mlp_down": "optim.c_proj",
    "optim.expert_up": "optim.expert_c_fc",
    "optim.expert_down": "optim.expert_c_proj",
    "optim.muon.averaged": "optim.muon.momentum_ema",
    "optim.muon.up_shape": "optim.muon.c_fc_orientation",
    "optim.muon.move_idle": "optim.muon.update_idle_experts",
    "data.max_document": "data.max_doc_len",
    "numerics.fp8_mlp.down": "numerics.fp8_mlp.c_proj",
    "system.ranks_per_forward": "system.ranks_per_microbatch",
    "system.recompute": "system.activation_checkpoint",
}
FIRST = {present: former for former, present in SETTINGS.items()}

PARAMETERS = [  # (former name, present name) of parameters; {} stands for any beginning
    ("embed.table", "embed.weight"),
    ("head.weight", "lm_head.weight"),
    ("{}.mlp.up", "{}.mlp.c_fc"),
    ("{}.mlp.down", "{}.mlp.c_proj"),
    ("{}.mlp.up_bias", "{}.mlp.c_fc_bias"),
    ("{}.mlp.down_bias", "{}.mlp.c_proj_bias"),
    ("{}.mlp.shared.up", "{}.mlp.shared.c_fc"),
    ("{}.mlp.shared.down", "{}.mlp.shared.c_proj"),
    ("{}.mlp.shared.up_bias", "{}.mlp.shared.c_fc_bias"),
    ("{}.mlp.shared.down_bias", "{}.mlp.shared.c_proj_bias"),
    ("{}.attn.k_turning", "{}.attn.k_rope"),
    ("residual.x.value", "residual.resid_lambdas.value"),
    ("residual.x0.value", "residual.x0_lambdas.value"),
    ("residual.skip.value", "residual.skip_weights.value"),
    ("values.v.value", "values.v_lambdas.value"),
    ("values.ve.value", "values.ve_lambdas.value"),
]


# ----- settings ---------------------------------------------------------------------------------------------

def present_path(path: str) -> str:
    """The present path of a setting that is given by its former one; any other path as it is."""
    parts, former = [], ""
    for part in path.split("."):
        former = f"{former}.{part}" if former else part
        parts.append(SETTINGS.get(former, former).rpartition(".")[2])
    return ".".join(parts)


def present_settings(tree: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Nested dicts of settings under their present names.

    Args:
        section: path of the section that the dict holds; '' for all settings.
    """
    return _renamed(tree, SETTINGS, section)


def first_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of settings under their first names, for hashes."""
    return _renamed(tree, FIRST, "")


def _renamed(tree, names, section):
    out = {}
    for name, value in tree.items():
        path = f"{section}.{name}" if section else name
        new = names.get(path, path).rpartition(".")[2]
        if new in out:
            raise UserError(f"{path} is given twice, under its former and its present name: keep one")
        out[new] = _renamed(value, names, path) if isinstance(value, dict) else value
    return out


def present_change(change: str) -> str:
    """A change as logs and claims hold it (`--set path=value`, `--without path`), under the present path."""
    flag, space, text = change.partition(" ")
    path, rest = re.fullmatch(r"([\w.]*)(.*)", text, re.DOTALL).groups()
    return flag + space + present_path(path) + rest


# ----- parameters -------------------------------------------------------------------------------------------

def _pattern(name):
    return re.compile(re.escape(name).replace(r"\{\}", "(.+)"))


def _translated(name, pairs):
    for old, new in pairs:
        if found := old.fullmatch(name):
            return new.format(*found.groups())
    return name


_TO_FIRST = [(_pattern(present), former) for former, present in PARAMETERS]
_TO_PRESENT = [(_pattern(former), present) for former, present in PARAMETERS]


def first_parameter(name: str) -> str:
    """The first name of a parameter, which seeds its initial value."""
    return _translated(name, _TO_FIRST)


def present_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """A dict by parameter name (a checkpoint's model, gradient checksums) under the present names."""
    return {_translated(name, _TO_PRESENT): value for name, value in values.items()}
