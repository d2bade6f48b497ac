"""HTTP basics shared by the gateway's packages: paths, access, headers, errors, pages of lists."""
