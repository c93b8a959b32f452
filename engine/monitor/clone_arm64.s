#include "go_asm.h"
#include "textflag.h"

// Registers: R19 the childRun, R20 the call, R21 its number, R22 how many there are.
TEXT ·runChild(SB),NOSPLIT|NOFRAME,$0-24
	MOVD	r+0(FP), R19
	MOVD	childRun_args(R19), R0
	MOVD	childRun_argsSize(R19), R1
	MOVD	$435, R8 // clone3
	SVC
	CBZ	R0, child
	MOVD	ZR, errno+16(FP)
	CMN	$4095, R0
	BCC	made
	NEG	R0, R0
	MOVD	R0, errno+16(FP)
	MOVD	ZR, R0
made:
	MOVD	R0, pid+8(FP)
	RET

child:
	MOVD	childRun_calls(R19), R20
	MOVD	childRun_n(R19), R22
	MOVD	ZR, R21
next:
	CMP	R22, R21
	BEQ	end
	MOVD	call_nr(R20), R8
	MOVD	(call_a+0)(R20), R0
	MOVD	(call_a+8)(R20), R1
	MOVD	(call_a+16)(R20), R2
	MOVD	(call_a+24)(R20), R3
	MOVD	(call_a+32)(R20), R4
	MOVD	ZR, R5
	SVC
	CMN	$4095, R0
	BCS	failed
	MOVBU	call_fork(R20), R1
	CBZ	R1, done
	CBNZ	R0, forked
done:
	ADD	$call__size, R20
	ADD	$1, R21
	B	next

failed:
	NEG	R0, R0
	MOVD	R0, (childRun_rec+8)(R19)
	ADD	$const_tagError, R21, R0
	MOVD	R0, (childRun_rec+0)(R19)
	MOVD	$127, R23
	B	report

forked:
	MOVD	R0, (childRun_rec+8)(R19)
	MOVD	$const_tagChild, R0
	MOVD	R0, (childRun_rec+0)(R19)
	MOVD	ZR, R23

// R23 is the status to end with.
report:
	MOVD	childRun_late(R19), R0
	MOVD	childRun_moved(R19), R1
	CMP	R1, R21
	BCS	write
	MOVD	childRun_early(R19), R0
write:
	ADD	$childRun_rec, R19, R1
	MOVD	$16, R2
	MOVD	$64, R8 // write
	SVC
	B	exit
end:
	MOVD	$126, R23
exit:
	MOVD	R23, R0
	MOVD	$94, R8 // exit_group
	SVC
	B	exit
