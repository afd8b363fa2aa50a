from distillbev.world import SplitConfig, WorldConfig

SMALL = WorldConfig(
    seed=4,
    splits=(SplitConfig(name="train", scenes=2), SplitConfig(name="val", scenes=1)),
    key_frames_per_scene=3,
    image_size_px=(96, 54),
    lidar_sweeps=2,
    lidar_azimuth_steps=360,
)
