#define NVAE_ISA baseline
#include "cpu/table.h"
