#include "textflag.h"

// The program: see the package comment. At its start the stack holds the number of arguments (one), the address of it, 0,
// the address of the first string of the environment, 0. The first two of these are used again; it needs no more.
// R19 is the pid.
TEXT ·reaper(SB),NOSPLIT|NOFRAME,$0
	MOVD	24(RSP), R1
	MOVD	$0, R19
	MOVD	$10, R2
digit:
	MOVBU.P	1(R1), R0
	SUBW	$48, R0
	CMPW	$9, R0
	BHI	name
	MULW	R2, R19, R19
	ADDW	R0, R19
	B	digit
name:
	MOVZ	$0x6e69, R0 // "init"
	MOVK	$(0x7469<<16), R0
	MOVD	R0, 8(RSP)
	MOVD	$15, R0 // PR_SET_NAME
	ADD	$8, RSP, R1
	MOVD	$167, R8 // prctl
	SVC
	MOVD	$0, R0
	MOVD	$0, R1
	ADD	$8, RSP, R2
	MOVD	$8, R3
	MOVD	$135, R8 // rt_sigprocmask: what is blocked is what is waited for
	SVC
reap:
	MOVD	$-1, R0
	MOVD	RSP, R1
	MOVD	$1, R2 // WNOHANG
	MOVD	$0, R3
	MOVD	$260, R8 // wait4
	SVC
	CMPW	R19, R0
	BEQ	ended
	CMPW	$0, R0
	BGT	reap
wait:
	ADD	$8, RSP, R0
	MOVD	$0, R1
	MOVD	$0, R2
	MOVD	$8, R3
	MOVD	$137, R8 // rt_sigtimedwait
	SVC
	CMPW	$0, R0
	BLE	wait
	CMPW	$17, R0 // SIGCHLD
	BEQ	reap
	MOVD	R0, R1
	MOVD	R19, R0
	MOVD	$129, R8 // kill
	SVC
	B	wait
ended:
	MOVWU	(RSP), R1
	UBFX	$8, R1, $8, R0
	ANDS	$127, R1
	BEQ	exit
	ADD	$128, R1, R0
exit:
	MOVD	$94, R8 // exit_group
	SVC
	DWORD	$0x646e652072706172 // marks the end

DATA	·start(SB)/8, $·reaper(SB)
GLOBL	·start(SB), NOPTR, $8
