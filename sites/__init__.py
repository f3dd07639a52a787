"""What runs inside a hospital: it may read voxels and decides what may leave."""
