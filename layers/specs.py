"""Per-layer specifications, derived once from the settings, without torch.

No other module reads settings that list layers.
"""

from dataclasses import dataclass
from typing import Literal

from model_settings import query_dim, rotary_dim, value_dim
from settings import Settings


@dataclass(frozen=True)
class AttnSpec:
    """Attention of one layer."""
    heads: int
    qk: int  # width of a head's query and key
    v: int  # width of a head's value
    rotary: int | None  # channels of a head's query and key with rotary positions; None: no rotary embedding
    window: Literal["long", "short"] | None  # the window of this layer; None: no window
    gate: int | None  # input channels of the gate on each head's output
    value_table: int | None  # number of the value embedding table; None: none
    value_gate: int | None = None  # input channels of the gate on each head's row of this table
    key_offset: int = 0  # channel pairs of a key that are those of the previous token


@dataclass(frozen=True)
class LayerSpec:
    """One block. A part that is None (False) is dropped."""
    attn: AttnSpec | None
    mlp: int | None  # hidden width of the dense MLP
    moe: bool  # mixture of experts instead of the dense MLP

    @property
    def empty(self) -> bool:
        """Whether the layer has neither attention nor MLP, so that the stream passes unchanged."""
        return self.attn is None and self.mlp is None and not self.moe


def layer_specs(s: Settings) -> tuple[LayerSpec, ...]:
    """The specification of every layer."""
    return tuple(LayerSpec(attn_spec(s, layer), *mlp_spec(s, layer)) for layer in range(s.model.num_layers))


def attn_spec(s: Settings, layer: int) -> AttnSpec | None:
    """The attention of a layer, None where it is dropped."""
    a = s.model.attn
    if layer in a.drop_layers:
        return None
    window = None
    if a.window is not None:
        window = "long" if a.window.long_layers is None or layer in a.window.long_layers else "short"
    table = a.value_embed.tables[layer] if a.value_embed else -1
    value_gate = a.value_embed.gate if table >= 0 else None
    offset = a.key_offset and window != "short"
    return AttnSpec(
        heads=a.num_heads, qk=query_dim(s), v=value_dim(s), rotary=rotary_dim(s) if a.rope else None,
        window=window, gate=a.gate.channels if a.gate else None, value_table=table if table >= 0 else None,
        value_gate=value_gate.channels if value_gate else None,
        key_offset=rotary_dim(s) // 4 if offset else 0  # the pairs that the half-truncated rotation leaves
    )


def mlp_spec(s: Settings, layer: int) -> tuple[int | None, bool]:
    """(hidden width of the dense MLP or None, whether the layer has experts)."""
    mlp = s.model.mlp
    if layer in mlp.drop_layers:
        return None, False
    if mlp.moe is not None and layer not in mlp.moe.dense_layers:
        return None, True
    hidden = mlp.expansion * s.model.model_dim
    return (2 * hidden // 3 if mlp.activation == "swiglu" else hidden), False


def num_value_tables(s: Settings) -> int:
    """How many token tables model.attn.value_embed has; a dropped layer's table is among them."""
    return max(s.model.attn.value_embed.tables) + 1
