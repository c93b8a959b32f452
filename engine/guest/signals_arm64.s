#include "textflag.h"

// The handler: the signal's number comes in R0, and all registers are restored after it. It returns to what the kernel has
// for that.
TEXT ·onSignal(SB),NOSPLIT|NOFRAME,$0
	SUB	$16, RSP
	MOVB	R0, 8(RSP)
	MOVW	·signalFd(SB), R0
	ADD	$8, RSP, R1
	MOVD	$1, R2
	MOVD	$64, R8 // write
	SVC
	ADD	$16, RSP
	RET

DATA	·onSignalPC(SB)/8, $·onSignal(SB)
GLOBL	·onSignalPC(SB), NOPTR, $8
DATA	·sigreturnPC(SB)/8, $0
GLOBL	·sigreturnPC(SB), NOPTR, $8
