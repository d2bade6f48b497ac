// Hides instruction sets from a program, whatever library asks the processor for them: for LD_PRELOAD.
//
//   gcc -O2 -shared -fPIC mask_cpuid.c -o mask_cpuid.so; CPUID_MASK=avx2 LD_PRELOAD=$PWD/mask_cpuid.so PROGRAM
//
// CPUID faults once Linux is asked for it (arch_prctl(2), ARCH_SET_CPUID; flag cpuid_fault in /proc/cpuinfo). The fault's
// handler runs the instruction and clears the bits of what CPUID_MASK (avx2, avx2_vnni, avx512 or avx512_vnni) does not
// have. Threads and forks inherit the setting; a program that is started loads this library again. The C library itself
// has asked before, so it still copies memory with the best instructions.
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

// Bits of leaf 7: subleaf 0 in EBX, ECX and EDX, subleaf 1 in EAX and EDX. Intel's manual, volume 2, CPUID.
struct bits {
  unsigned ebx, ecx, edx, eax1, edx1;
};
#define BIT(n) (1u << (n))
static const struct bits newer = {  // AMX, AVX-512 with bf16 and fp16, AVX-VNNI with other types, AVX10
    .edx = BIT(22) | BIT(23) | BIT(24) | BIT(25),
    .eax1 = BIT(5) | BIT(21) | BIT(23),
    .edx1 = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19),
};
static const struct bits vnni512 = {  // and what came with it: IFMA, VBMI, BITALG, VPOPCNTDQ, VP2INTERSECT
    .ebx = BIT(21),
    .ecx = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14),
    .edx = BIT(8),
};
static const struct bits vnni256 = {.eax1 = BIT(4)};
static const struct bits avx512 = {.ebx = BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31), .edx = BIT(2) | BIT(3)};

static struct bits hidden;

static void hide(struct bits some) {
  hidden.ebx |= some.ebx, hidden.ecx |= some.ecx, hidden.edx |= some.edx;
  hidden.eax1 |= some.eax1, hidden.edx1 |= some.edx1;
}

static void on_fault(int number, siginfo_t* info, void* context) {
  greg_t* regs = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* at = (const unsigned char*)regs[REG_RIP];
  if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) {  // not CPUID
    signal(number, SIG_DFL);
    return;
  }
  const unsigned leaf = regs[REG_RAX], subleaf = regs[REG_RCX];
  unsigned a, b, c, d;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 7 && subleaf == 0) b &= ~hidden.ebx, c &= ~hidden.ecx, d &= ~hidden.edx;
  if (leaf == 7 && subleaf == 1) a &= ~hidden.eax1, d &= ~hidden.edx1;
  regs[REG_RAX] = a, regs[REG_RBX] = b, regs[REG_RCX] = c, regs[REG_RDX] = d;
  regs[REG_RIP] += 2;
}

// Programs must not replace the handler.
int sigaction(int number, const struct sigaction* new, struct sigaction* old) {
  static int (*real)(int, const struct sigaction*, struct sigaction*);
  if (!real) real = (int (*)(int, const struct sigaction*, struct sigaction*))dlsym(RTLD_NEXT, "sigaction");
  return real(number, number == SIGSEGV && new && new->sa_sigaction != on_fault ? NULL : new, old);
}

__attribute__((constructor)) static void start(void) {
  const char* set = getenv("CPUID_MASK");
  if (!set) return;
  hide(newer);
  if (strcmp(set, "avx2_vnni")) hide(vnni256);
  if (strcmp(set, "avx512_vnni")) hide(vnni512);
  if (!strncmp(set, "avx2", 4)) hide(avx512);
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
    static const char text[] = "this processor cannot hide instruction sets\n";
    (void)!write(2, text, sizeof text - 1);
    _exit(1);
  }
}
