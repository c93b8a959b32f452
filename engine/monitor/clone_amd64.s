#include "go_asm.h"
#include "textflag.h"

// Registers: R12 the childRun, R13 the call, BX its number.
TEXT ·runChild(SB),NOSPLIT|NOFRAME,$0-24
	MOVQ	r+0(FP), R12
	MOVQ	childRun_args(R12), DI
	MOVQ	childRun_argsSize(R12), SI
	MOVL	$435, AX // clone3
	SYSCALL
	TESTQ	AX, AX
	JEQ	child
	MOVQ	$0, errno+16(FP)
	CMPQ	AX, $0xfffffffffffff001
	JCS	made
	NEGQ	AX
	MOVQ	AX, errno+16(FP)
	MOVQ	$0, AX
made:
	MOVQ	AX, pid+8(FP)
	RET

child:
	MOVQ	childRun_calls(R12), R13
	XORL	BX, BX
next:
	CMPQ	BX, childRun_n(R12)
	JEQ	end
	MOVQ	call_nr(R13), AX
	MOVQ	(call_a+0)(R13), DI
	MOVQ	(call_a+8)(R13), SI
	MOVQ	(call_a+16)(R13), DX
	MOVQ	(call_a+24)(R13), R10
	MOVQ	(call_a+32)(R13), R8
	XORL	R9, R9
	SYSCALL
	CMPQ	AX, $0xfffffffffffff001
	JCC	failed
	CMPB	call_fork(R13), $0
	JEQ	done
	TESTQ	AX, AX
	JNE	forked
done:
	ADDQ	$call__size, R13
	INCQ	BX
	JMP	next

failed:
	NEGQ	AX
	MOVQ	AX, (childRun_rec+8)(R12)
	LEAQ	const_tagError(BX), AX
	MOVQ	AX, (childRun_rec+0)(R12)
	MOVL	$127, R14
	JMP	report

forked:
	MOVQ	AX, (childRun_rec+8)(R12)
	MOVQ	$const_tagChild, (childRun_rec+0)(R12)
	XORL	R14, R14

// R14 is the status to end with.
report:
	MOVQ	childRun_late(R12), DI
	CMPQ	BX, childRun_moved(R12)
	JCC	write
	MOVQ	childRun_early(R12), DI
write:
	LEAQ	childRun_rec(R12), SI
	MOVL	$16, DX
	MOVL	$1, AX // write
	SYSCALL
	JMP	exit
end:
	MOVL	$126, R14
exit:
	MOVL	R14, DI
	MOVL	$231, AX // exit_group
	SYSCALL
	JMP	exit
