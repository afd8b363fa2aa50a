"""Camera-only bird's-eye-view 3-D detectors that learn by imitating LiDAR detectors."""

__version__ = "0.1.0"
