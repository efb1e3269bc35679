"""A heat map as an image, made with NumPy alone.

Its colours are those of the page: blue is low, grey is the middle, orange is high, black is zero.
"""

import numpy as np

from steptron.monitor.statistics.downsample import median

OCTAVES = 2.0
"""The ratio, in powers of two, at which the colour scale ends."""
CELL, WIDTH = 4, 1200
"""The least pixels of a cell, and roughly the largest width of the image in pixels."""
_STOPS = np.array([[14, 72, 140], [120, 174, 222], [241, 241, 238], [240, 172, 92], [168, 62, 8]], dtype=np.float64)
_ZERO, _UNKNOWN = (20, 20, 22), (255, 255, 255)


def ratios(values_LE: np.ndarray) -> np.ndarray:
    """Return each value divided by the median of its row; NaN if the median is 0 or unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios_LE = values_LE / median(values_LE)[:, None]
    return np.where(np.isfinite(ratios_LE), ratios_LE, np.nan)


def heat(ratios_LE: np.ndarray) -> np.ndarray:
    """Return an image, uint8 [height, width, 3], with one row of cells per layer."""
    with np.errstate(divide="ignore", invalid="ignore"):
        place_LE = (np.clip(np.log2(ratios_LE), -OCTAVES, OCTAVES) / OCTAVES + 1) / 2 * (len(_STOPS) - 1)
    place_LE = np.where(np.isfinite(place_LE), place_LE, 0)
    stops = np.arange(len(_STOPS))
    colours = np.stack([np.interp(place_LE, stops, _STOPS[:, channel]) for channel in range(3)], axis=-1)
    colours[ratios_LE == 0] = _ZERO
    colours[np.isnan(ratios_LE)] = _UNKNOWN
    size = max(CELL, min(24, WIDTH // ratios_LE.shape[1]))
    return np.rint(colours).astype(np.uint8).repeat(size, axis=0).repeat(size, axis=1)
