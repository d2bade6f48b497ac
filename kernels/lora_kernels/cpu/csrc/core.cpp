// These files as one translation unit: separately, each spends about half of its compile time on the common headers.
#include "changes.cpp"
#include "lora.cpp"
#include "operations.cpp"
#include "pack.cpp"
#include "processor.cpp"
#include "quantised.cpp"
#include "states.cpp"
#include "team.cpp"
