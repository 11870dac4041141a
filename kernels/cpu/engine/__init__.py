"""What every CPU kernel stands on, from the bottom up: host, simd, vecmath, tile, threads, build, workspace."""
