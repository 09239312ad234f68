"""Plans without torch: recompute blocks, pipeline schedules, their simulation and views."""
