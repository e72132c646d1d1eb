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
    value_gate_own: bool = False  # whether half of these channels are the value embedding's own
    paired: bool = False  # heads h and h + heads/2 share one sequence
    saved_input: int | None = None  # layer after which the stream is attention's input; None: as it arrives
    xsa: bool = False  # exclusive self-attention
    compose: int | None = None  # window of composed heads; None: heads are not composed


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
    paired = layer in a.paired_layers
    offset = a.key_offset and window != "short" and not paired
    own = value_gate is not None and value_gate.own_channels in ("all", "all" if paired else "unpaired")
    return AttnSpec(
        heads=a.num_heads,
        qk=query_dim(s),
        v=value_dim(s),
        rotary=rotary_dim(s) if a.rope else None,
        window=window,
        gate=head_gate(s, layer),
        value_table=table if table >= 0 else None,
        value_gate=value_gate.channels if value_gate else None,
        value_gate_own=own,
        key_offset=rotary_dim(s) // 4 if offset else 0,  # the pairs that the half-truncated rotation leaves
        paired=paired,
        saved_input=a.saved_input if a.saved_input is not None and layer > a.saved_input else None,
        xsa=a.xsa is not None and layer in a.xsa.layers,
        compose=a.compose.window if a.compose and layer in a.compose.layers else None,
    )


def head_gate(s: Settings, layer: int) -> int | None:
    """Input channels of the gate on a layer's heads.

    None without a gate, and with token gates, whose networks give the gate instead (gated_layers).
    """
    gate = s.model.attn.gate
    own = gate is not None and s.model.token_gates is None
    return gate.channels if own and layer in gated_layers(s) else None


def gated_layers(s: Settings) -> tuple[int, ...]:
    """The layers whose heads have a gate of either kind."""
    a = s.model.attn
    if a.gate is None:
        return ()
    named = range(s.model.num_layers) if a.gate.layers is None else a.gate.layers
    return tuple(i for i in named if i not in a.drop_layers)


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
