// Package osloconf reads the configuration files of OpenStack services as
// oslo.config does, so that nova.conf can be used as it is: several files and
// directories of which later ones win, options that may be given several
// times, continuation lines, quotes, and references from one option to
// another. Values get their type when they are read, and every complaint names
// the option, the file and the line.
//
// There is no registry of options and no global state: a [Config] is what was
// read, and the caller says on access what it expects. Complaints gather in
// the Config and are asked for once, with Err, so that an operator sees all of
// them at the first start.
package osloconf
