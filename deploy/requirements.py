"""Print the dependencies that pyproject.toml declares, with those of the extras named as arguments."""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for requirement in project["dependencies"]:
    print(requirement)
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
