#include "textflag.h"

// The program: see the package comment. At its start the stack holds the number of arguments (one), the address of it, 0,
// the address of the first string of the environment, 0. The first two of these are used again; it needs no more.
// BX is the pid.
TEXT ·reaper(SB),NOSPLIT|NOFRAME,$0
	MOVQ	24(SP), SI
	XORL	BX, BX
digit:
	MOVBLZX	(SI), AX
	INCQ	SI
	SUBL	$48, AX
	CMPL	AX, $9
	JHI	name
	IMUL3L	$10, BX, BX
	ADDL	AX, BX
	JMP	digit
name:
	MOVQ	$0x74696e69, AX // "init"
	MOVQ	AX, 8(SP)
	MOVL	$15, DI // PR_SET_NAME
	LEAQ	8(SP), SI
	MOVL	$157, AX // prctl
	SYSCALL
	XORL	DI, DI
	XORL	SI, SI
	LEAQ	8(SP), DX
	MOVL	$8, R10
	MOVL	$14, AX // rt_sigprocmask: what is blocked is what is waited for
	SYSCALL
reap:
	MOVQ	$-1, DI
	MOVQ	SP, SI
	MOVL	$1, DX // WNOHANG
	XORL	R10, R10
	MOVL	$61, AX // wait4
	SYSCALL
	CMPL	AX, BX
	JEQ	ended
	TESTL	AX, AX
	JGT	reap
wait:
	LEAQ	8(SP), DI
	XORL	SI, SI
	XORL	DX, DX
	MOVL	$8, R10
	MOVL	$128, AX // rt_sigtimedwait
	SYSCALL
	TESTL	AX, AX
	JLE	wait
	CMPL	AX, $17 // SIGCHLD
	JEQ	reap
	MOVL	BX, DI
	MOVL	AX, SI
	MOVL	$62, AX // kill
	SYSCALL
	JMP	wait
ended:
	MOVL	(SP), DI
	MOVL	DI, AX
	SHRL	$8, DI
	ANDL	$255, DI
	ANDL	$127, AX
	JEQ	exit
	LEAL	128(AX), DI
exit:
	MOVL	$231, AX // exit_group
	SYSCALL
	QUAD	$0x646e652072706172 // marks the end

DATA	·start(SB)/8, $·reaper(SB)
GLOBL	·start(SB), NOPTR, $8
