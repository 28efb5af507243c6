"""What Wan makes of extents."""

from frostline.models.wan.video_shape import nearest_multiple


def test_nearest_multiple() -> None:
    assert [nearest_multiple(size) for size in (1, 16, 23, 24, 39, 40, 480)] == [16, 16, 16, 32, 32, 48, 480]
    assert [nearest_multiple(size, 32) for size in (1, 47, 48, 79, 80, 480)] == [32, 32, 64, 64, 96, 480]
