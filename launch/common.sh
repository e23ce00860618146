# What the scripts of this folder share; they source it.
# shellcheck shell=bash

dry_run=''
jdm=()   # the words after --, for jdm train

# The comment at the top of the script, as its help.
usage() { sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p;}' "$0"; }

# Ends with status 2: one sentence about an argument.
fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# read_options "names of options" "names of switches" arguments…: sets a variable for each
# --name=value and --switch (a - in the name is a _), and `jdm`. Its own variables begin with a _, so
# that none of them is meant.
read_options() {
  local _options=" $1 " _switches=" $2 dry-run " _word _name
  shift 2
  while (($#)); do
    _word=$1
    shift
    _name=${_word%%=*}
    _name=${_name#--}
    if [[ $_word == -- ]]; then
      jdm=("$@")
      return
    elif [[ $_word == --help || $_word == -h ]]; then
      usage
      exit 0
    elif [[ $_word == --*=* && $_options == *" $_name "* ]]; then
      [[ -n ${_word#*=} ]] || fail "--$_name is empty"
      printf -v "${_name//-/_}" %s "${_word#*=}"
    elif [[ $_word == --* && $_switches == *" $_name "* ]]; then
      [[ $_word != *=* ]] || fail "$_word must be --$_name alone"
      printf -v "${_name//-/_}" yes
    elif [[ $_options == *" $_name "* ]]; then
      fail "$_word needs a value: --$_name=…"
    else
      fail "'$_word' is no option here; --help lists them, and those of jdm train go after --"
    fi
  done
}

# required names…: each option must have a value.
required() {
  local _name
  for _name; do
    _name=${_name//-/_}
    [[ -n ${!_name:-} ]] || fail "--${_name//_/-} is missing; --help says what it is"
  done
}

# fits NAME PATTERN SENTENCE: the option --NAME must match the regular expression as a whole.
fits() {
  local LC_ALL=C _variable=${1//-/_} # in some languages [a-z] has capitals
  [[ ${!_variable} =~ ^($2)$ ]] || fail "--$1='${!_variable}' $3"
}

# Options that the scripts set themselves may not be given to jdm train once more.
check_jdm_flags() {
  local word
  for word in ${jdm[@]+"${jdm[@]}"}; do
    case $word in
    --config=* | --workdir=* | --config | --workdir)
      fail "'$word' after -- must be given before it" ;;
    --distributed | --coordinator* | --processes* | --process=* | --process)
      fail "'$word' after -- is set by this script" ;;
    esac
  done
}

# Words in the form in which a shell reads them again.
quoted() {
  local word name out='' inner="'\\''"
  for word; do
    name=''
    if [[ $word =~ ^--[a-z-]+= ]]; then
      name=${BASH_REMATCH[0]}
      word=${word#"$name"}
    fi
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$inner}'"
    out+=" $name$word"
  done
  printf '%s\n' "${out# }"
}

# Runs a command; with --dry-run, prints it.
run() {
  if [[ $dry_run ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# A comment between the commands of --dry-run.
note() { [[ -z $dry_run ]] || printf '# %s\n' "$1"; }

needs() {
  [[ $dry_run ]] || command -v "$1" >/dev/null || fail "the command $1 is not there: $2"
}
