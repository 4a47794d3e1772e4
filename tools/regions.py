"""The recipe `regions`: maps from photographs with no weights at all.

An image is cut into regions of even colour (Felzenszwalb and Huttenlocher, "Efficient Graph-Based
Image Segmentation", IJCV 2004, as scikit-image has it). A region is an instance, unless it holds
much of the image's border: that is ground. Regions of the whole folder, described by colour,
texture and place, are put into k-means clusters, and a cluster is a semantic class.

    describe   an image's regions, and 16 numbers for each
    learn      clusters from the regions of many images
    maps       an image's two maps, from its regions and the clusters

Objects of several colours fall apart, and a cluster is no category: docs/data.md has the scores.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from data import UNLABELLED, UserError, nearest

SIDE = 128  # longest side on which regions are found; a crop takes 56 x 56 labels of them
SCALE, SMALLEST = 1 / 30, 1 / 300  # of the image's pixels: Felzenszwalb's k, and the least region
SIGMA = 0.5
GROUND = 0.2  # share of the image's border above which a region is background
ORIENTATIONS = 8
# NOTE all but ORIENTATIONS were chosen on 50 or 100 photographs of COCO, see docs/data.md.


def require() -> None:
    """UserError where scikit-image, which brings SciPy, is absent."""
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise UserError("--recipe regions: pip install scikit-image") from None


def shrink(rgb: Tensor) -> np.ndarray:
    """Reduce (3, H, W) uint8 to a longest side of at most SIDE: (h, w, 3) uint8."""
    H, W = rgb.shape[1:]
    share = min(1.0, SIDE / max(H, W))
    size = max(round(H * share), 1), max(round(W * share), 1)
    if share < 1:
        rgb = F.interpolate(rgb[None], size, mode="bilinear", antialias=True)[0]
    return np.ascontiguousarray(rgb.permute(1, 2, 0).numpy())


def describe(rgb: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the regions of an image (3, H, W) uint8.

    Returns:
        regions (h, w) int64, 0 .. n - 1, of the reduced image.
        features (n, 16) float32: mean and deviation of L, a, b (6); gradients of L, by orientation,
            as shares (8), and their size (1); height in the image (1).
        border (n,) float64, each region's share of the image's border.
    """
    from skimage.color import rgb2lab
    from skimage.segmentation import felzenszwalb

    pixels = shrink(rgb)
    h, w = pixels.shape[:2]
    options = {"scale": h * w * SCALE, "min_size": round(h * w * SMALLEST), "sigma": SIGMA}
    regions = felzenszwalb(pixels, **options).astype(np.int64)
    _, flat = np.unique(regions, return_inverse=True)
    flat, n = flat.ravel(), int(flat.max()) + 1
    area = np.bincount(flat)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(flat, values.ravel(), n) / area

    lab = rgb2lab(pixels)
    means = [mean(lab[..., c]) for c in range(3)]
    squares = [mean(lab[..., c] ** 2) for c in range(3)]
    deviations = [np.sqrt(np.maximum(s - m**2, 0)) for s, m in zip(squares, means)]
    light = np.pad(lab[..., 0], 1, mode="edge")
    dy, dx = light[2:, 1:-1] - light[:-2, 1:-1], light[1:-1, 2:] - light[1:-1, :-2]
    size, angle = np.hypot(dy, dx), np.arctan2(dy, dx) % np.pi  # light to dark as dark to light
    bins = np.minimum(angle / np.pi * ORIENTATIONS, ORIENTATIONS - 1).astype(int)
    edges = [mean(np.where(bins == k, size, 0)) for k in range(ORIENTATIONS)]
    strength = np.maximum(np.sum(edges, 0), 1e-6)
    y, x = np.mgrid[:h, :w]
    frame = (y == 0) | (y == h - 1) | (x == 0) | (x == w - 1)
    border = np.bincount(flat, frame.ravel(), n) / frame.sum()
    texture = [*(e / strength for e in edges), np.log1p(strength)]
    columns = [*means, *deviations, *texture, mean(y + 0.5) / h]
    return flat.reshape(h, w), np.stack(columns, 1).astype(np.float32), border


def learn(features: np.ndarray, clusters: int) -> np.ndarray:
    """Put regions (n, 16) into clusters: (2 + clusters, 16) float32, means, deviations, centres."""
    from scipy.cluster.vq import kmeans2

    if len(features) < clusters:
        raise UserError(f"{len(features)} regions in all: --clusters {clusters} is more than that")
    mean, deviation = features.mean(0), np.maximum(features.std(0), 1e-6)
    z = (features - mean) / deviation
    centres, _ = kmeans2(z, clusters, iter=20, minit="++", seed=0, missing="warn")
    return np.stack([mean, deviation, *centres]).astype(np.float32)


def maps(book: np.ndarray, rgb: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Label an image (3, H, W) uint8 by what `learn` returned: instance, semantic (H, W) uint8."""
    regions, features, border = describe(rgb)
    mean, deviation, centres = book[0], book[1], book[2:]
    z = (features - mean) / deviation
    cluster = (-2 * z @ centres.T + (centres**2).sum(1)).argmin(1)  # |z - c|^2 without z's own
    order = np.argsort(-np.bincount(regions.ravel()), kind="stable")  # instance 1 is the largest
    order = order[border[order] <= GROUND]
    table = np.zeros(len(border), np.uint8)
    table[order] = np.minimum(np.arange(1, len(order) + 1), UNLABELLED)
    rows, columns = (nearest(0, n, N) for n, N in zip(regions.shape, rgb.shape[1:]))
    regions = regions[rows[:, None], columns]
    return table[regions], cluster.astype(np.uint8)[regions]
