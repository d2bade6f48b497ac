"""HTTP in words that every room uses: paths, access, headers, errors, pages of lists."""
