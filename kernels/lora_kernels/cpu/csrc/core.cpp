// These files as one unit: each alone spends about half of its compile time on headers that all of them read.
#include "changes.cpp"
#include "lora.cpp"
#include "operations.cpp"
#include "pack.cpp"
#include "processor.cpp"
#include "quantised.cpp"
#include "states.cpp"
#include "team.cpp"
