#include "textflag.h"

// The handler: the signal's number comes in DI, and all registers are restored after it.
TEXT ·onSignal(SB),NOSPLIT|NOFRAME,$0
	SUBQ	$24, SP
	MOVB	DI, 8(SP)
	MOVL	·signalFd(SB), DI
	LEAQ	8(SP), SI
	MOVL	$1, DX
	MOVL	$1, AX // write
	SYSCALL
	ADDQ	$24, SP
	RET

// What the handler returns to.
TEXT ·sigreturn(SB),NOSPLIT|NOFRAME,$0
	MOVL	$15, AX // rt_sigreturn
	SYSCALL
	INT	$3

DATA	·onSignalPC(SB)/8, $·onSignal(SB)
GLOBL	·onSignalPC(SB), NOPTR, $8
DATA	·sigreturnPC(SB)/8, $·sigreturn(SB)
GLOBL	·sigreturnPC(SB), NOPTR, $8
