"""Wiring of the residual stream: what is added to it besides the branches."""

from torch import nn

from layers.primitives import coefficient, scale_add


class Residual(nn.Module):
    """Owns what is added to the stream besides the branches: U-net skips (record 11) and the x0 mix (record 9)."""

    def __init__(self, s):
        super().__init__()
        r, layers, n = s.model.residual, s.model.num_layers, s.numerics
        self.half = layers // 2
        self.skip = self.x = self.x0 = None
        if r.unet_skips:
            u = r.unet_skips
            self.skip = coefficient(self.half, u.init if u.sigmoid is None else u.sigmoid, u.learned, n.scalar,
                                    sigmoid=u.sigmoid is not None)
        if r.x0_mix:
            self.x = coefficient(layers, r.x0_mix.x, r.x0_mix.learned, n.scalar)
            self.x0 = coefficient(layers, r.x0_mix.x0, r.x0_mix.learned, n.scalar)

    def begin(self, x0):
        """A pair of functions (enter, leave) for one forward pass: stream before and after block i."""
        skip = self.skip() if self.skip is not None else None
        a, b = (self.x(), self.x0()) if self.x is not None else (None, None)
        saved = []

        def enter(i, x):
            if skip is not None and i >= self.half:  # last in, first out: block `half` gets its neighbour's output
                x = scale_add(1.0, x, skip[i - self.half], saved.pop())
            if a is not None:
                x = scale_add(a[i], x, b[i], x0)
            return x.to(x0.dtype)

        def leave(i, x):
            if skip is not None and i < self.half:
                saved.append(x)
            return x

        return enter, leave
