"""The directions that stand in a chain in place of momentum and orthogonalisation (updates/chain.py)."""

from dataclasses import asdict

from settings.muon import Muon
from updates.adam_direction import AdamDirection
from updates.psgd import Psgd
from updates.shampoo import Shampoo
from updates.slots import Slot
from updates.soap_h import KlSoap, SoapH

SLOTS = {"adam": AdamDirection, "soap_h": SoapH, "kl_soap": KlSoap, "shampoo": Shampoo, "psgd": Psgd}


def direction(muon: Muon) -> list[Slot]:
    """The slot of the section that is on, with its settings; empty without one. muon: settings.optim.muon."""
    return [SLOTS[name](**asdict(getattr(muon, name))) for name in muon.directions()]
